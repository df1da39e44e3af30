//go:build linux

#include "textflag.h"

// func forkCalls(args *cloneArgs, size uintptr, calls *call, n uintptr) (pid, errno uintptr)
//
// The child shares our memory and our stack, so it touches no stack at all: registers and the table are all it uses.
TEXT ·forkCalls(SB),NOSPLIT,$0-48
	MOVQ calls+16(FP), R12
	MOVQ n+24(FP), R13
	MOVQ args+0(FP), DI
	MOVQ size+8(FP), SI
	MOVQ $435, AX // clone3
	SYSCALL
	TESTQ AX, AX
	JEQ  next
	CMPQ AX, $0xfffffffffffff001
	JCC  failed
	MOVQ AX, pid+32(FP)
	MOVQ $0, errno+40(FP)
	RET

failed:
	NEGQ AX
	MOVQ $0, pid+32(FP)
	MOVQ AX, errno+40(FP)
	RET

next:
	TESTQ R13, R13
	JEQ  exit
	MOVQ 0(R12), AX
	MOVQ 8(R12), DI
	MOVQ 16(R12), SI
	MOVQ 24(R12), DX
	MOVQ 32(R12), R10
	MOVQ 40(R12), R8
	MOVQ 48(R12), R9
	SYSCALL
	MOVQ AX, 56(R12)
	CMPQ AX, $0xfffffffffffff001
	JCS  done
	CMPQ 64(R12), $0 // may fail
	JEQ  exit

done:
	ADDQ $72, R12
	DECQ R13
	JMP  next

exit:
	MOVQ $231, AX // exit_group
	MOVQ $126, DI
	SYSCALL
	INT  $3
