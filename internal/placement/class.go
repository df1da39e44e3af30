package placement

import (
	"math"

	"github.com/thawrun/thaw/api"
)

// UnitMemory is the memory that one unit of a node stands for.
const UnitMemory = 16 << 20

// Class is a size of instances. What a revision asks for is rounded up to one, so that room is a number of units and nothing has to be packed.
type Class struct {
	Name   string
	Memory int64 // bytes that an instance is taken to need
	CPU    int64 // thousandths of a processor that it is taken to need
	Units  int   // that it takes of a node
}

// Classes are the sizes, the smallest first. Their memory is that of their units; processors are not counted on a node, because they can be
// shared in time, but who asks for much of them gets fewer neighbours.
var Classes = [...]Class{
	{"tiny", 16 << 20, 100, 1},
	{"small", 128 << 20, 250, 8},
	{"medium", 512 << 20, 500, 32},
	{"large", 1 << 30, 1000, 64},
	{"xlarge", 2 << 30, 2000, 128},
}

// ClassOf is the smallest class that holds what a revision's container requests. As in Kubernetes, who sets a limit alone requests as much;
// who says nothing is tiny. What is beyond the largest class is a multiple of that.
func ClassOf(rev *api.Revision) Class {
	c := rev.Serving()
	if c == nil {
		return Classes[0]
	}
	memory, cpu := requested(c, "memory", 1), requested(c, "cpu", 1000)
	for _, class := range Classes {
		if memory <= class.Memory && cpu <= class.CPU {
			return class
		}
	}
	class := Classes[len(Classes)-1]
	n := max((memory+class.Memory-1)/class.Memory, (cpu+class.CPU-1)/class.CPU)
	n = min(n, MaxUnits) // of which no node has even one
	return Class{class.Name, n * class.Memory, n * class.CPU, int(n) * class.Units}
}

// MemoryLimit is what an instance may use when its revision sets no limit: four times what it requests, and not less than 1 GiB, because what is
// requested says little about the most that is needed, and /tmp of a sandbox counts too.
func (c Class) MemoryLimit() int64 { return max(4*c.Memory, 1<<30) }

// mostRequested bounds what is computed with.
const mostRequested = 1 << 60

// requested is what a container requests of a resource, in so many parts of its unit; 0 = it does not say, or nothing that can be read.
func requested(c *api.Container, name string, parts float64) int64 {
	q, ok := c.Resources.Requests[name]
	if !ok {
		q, ok = c.Resources.Limits[name]
	}
	if !ok {
		return 0
	}
	v, err := q.Value()
	if err != nil || !(v > 0) {
		return 0
	}
	return int64(min(math.Ceil(v*parts), mostRequested))
}
