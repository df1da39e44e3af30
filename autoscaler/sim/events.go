package sim

// kind is what happens at an event.
type kind uint8

const (
	arrives      kind = iota // a request from outside
	called                   // a request from another function
	becomesReady             // an instance
	ends                     // a request
)

// event is something that will happen. Which fields count depends on the kind.
type event struct {
	at       float64
	order    uint64 // of being scheduled: equal times happen in this order, so that a run can be repeated
	key      uint64 // called
	instance *instance
	fn       int32
	from     int32 // called: the caller
	run      int32 // ends
	kind     kind
}

func (e *event) before(o *event) bool {
	return e.at < o.at || e.at == o.at && e.order < o.order
}

// events is a heap with four children for each node, which needs half the levels of the usual two.
type events struct {
	heap []event
	next uint64
}

func (q *events) push(e event) {
	e.order = q.next
	q.next++
	q.heap = append(q.heap, e)
	i := len(q.heap) - 1
	for i > 0 {
		parent := (i - 1) / 4
		if !e.before(&q.heap[parent]) {
			break
		}
		q.heap[i] = q.heap[parent]
		i = parent
	}
	q.heap[i] = e
}

func (q *events) pop() event {
	top := q.heap[0]
	last := len(q.heap) - 1
	e := q.heap[last]
	q.heap[last] = event{} // the instance may be collected
	q.heap = q.heap[:last]
	if last == 0 {
		return top
	}
	i := 0
	for {
		child := 4*i + 1
		if child >= last {
			break
		}
		best := child
		for c := child + 1; c < min(child+4, last); c++ {
			if q.heap[c].before(&q.heap[best]) {
				best = c
			}
		}
		if !q.heap[best].before(&e) {
			break
		}
		q.heap[i] = q.heap[best]
		i = best
	}
	q.heap[i] = e
	return top
}

// fifo is a queue of requests.
type fifo struct {
	items []arrival
	head  int
}

func (q *fifo) len() int { return len(q.items) - q.head }

func (q *fifo) push(a arrival) {
	if q.head > 64 && q.head > len(q.items)/2 {
		q.items = append(q.items[:0], q.items[q.head:]...)
		q.head = 0
	}
	q.items = append(q.items, a)
}

func (q *fifo) pop() arrival {
	a := q.items[q.head]
	q.head++
	return a
}

// run is a request inside an instance.
type run struct {
	in      *instance
	service float64 // seconds
}

// slab holds the running requests under small numbers, so that an event need not point to one.
type slab struct {
	items []run
	free  []int32
}

func (s *slab) add(r run) int32 {
	if n := len(s.free); n > 0 {
		i := s.free[n-1]
		s.free = s.free[:n-1]
		s.items[i] = r
		return i
	}
	s.items = append(s.items, r)
	return int32(len(s.items) - 1)
}

func (s *slab) take(i int32) run {
	r := s.items[i]
	s.items[i] = run{}
	s.free = append(s.free, i)
	return r
}
