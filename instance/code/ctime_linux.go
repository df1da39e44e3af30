package code

import "syscall"

// ctime also moves when a file's modification time is set back.
func ctime(st *syscall.Stat_t) int64 { return st.Ctim.Nano() }
