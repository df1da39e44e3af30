//go:build linux

#include "textflag.h"

// func forkCalls(args *cloneArgs, size uintptr, calls *call, n uintptr) (pid, errno uintptr)
//
// See fork_amd64.s.
TEXT ·forkCalls(SB),NOSPLIT,$0-48
	MOVD calls+16(FP), R19
	MOVD n+24(FP), R20
	MOVD args+0(FP), R0
	MOVD size+8(FP), R1
	MOVD $435, R8 // clone3
	SVC
	CBZ  R0, next
	CMN  $4095, R0
	BCS  failed
	MOVD R0, pid+32(FP)
	MOVD ZR, errno+40(FP)
	RET

failed:
	NEG  R0, R0
	MOVD ZR, pid+32(FP)
	MOVD R0, errno+40(FP)
	RET

next:
	CBZ  R20, exit
	MOVD 0(R19), R8
	MOVD 8(R19), R0
	MOVD 16(R19), R1
	MOVD 24(R19), R2
	MOVD 32(R19), R3
	MOVD 40(R19), R4
	MOVD 48(R19), R5
	SVC
	MOVD R0, 56(R19)
	CMN  $4095, R0
	BCC  done
	MOVD 64(R19), R1
	CBZ  R1, exit

done:
	ADD  $72, R19
	SUB  $1, R20
	B    next

exit:
	MOVD $94, R8 // exit_group
	MOVD $126, R0
	SVC
	BRK
