package api

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ownAnnotation is the rule of one of our own annotations.
type ownAnnotation struct {
	route bool // of a Service, a Route or a DomainMapping itself; else of a template or a revision
	// check returns what was expected, "" when value is that.
	check func(value string, l Limits) (expected string)
}

// ownAnnotations are all of them.
var ownAnnotations = map[string]ownAnnotation{
	AnnotationEventDriven:      {check: oneOfWords("true", "false")},
	AnnotationPlanner:          {check: oneOfWords("kpa", "predictive")},
	AnnotationSocket:           {check: oneOfWords(SocketFD3)},
	AnnotationReady:            {check: oneOfWords(ReadyFD4)},
	AnnotationNetwork:          {check: oneOfWords(NetworkHost)},
	AnnotationFrozenFor:        {check: durationWithin(0, MaxFrozenFor)},
	AnnotationFrozenMax:        {check: checkFrozenMax},
	AnnotationSticky:           {check: checkSticky},
	AnnotationSlowStart:        {check: durationWithin(0, MaxSlowStart)},
	AnnotationQueueMaxRequests: {check: checkQueueRequests},
	AnnotationQueueMaxBytes:    {check: checkQueueBytes},
	AnnotationQueueMaxWait:     {check: durationWithin(time.Second, MaxQueueWait)},
	AnnotationSubnet:           {check: checkSubnetRef},
	AnnotationEgress:           {check: oneOfWords(EgressNone, EgressShared, EgressFixed)},

	AnnotationTimeout:              {route: true, check: checkTimeout},
	AnnotationResponseStartTimeout: {route: true, check: checkTimeout},
	AnnotationIdleTimeout:          {route: true, check: checkTimeout},
}

// Bounds of our own annotations.
const (
	MaxSlowStart     = 10 * time.Minute
	MaxQueueWait     = time.Hour
	MaxQueueRequests = 1_000_000
	MinRouteTimeout  = time.Millisecond
	MaxFrozenFor     = 24 * time.Hour
	MaxFrozen        = 10_000
)

// own says that a key belongs to our own groups: there a name that nobody knows is a mistake, and more useful refused.
func own(key string) bool {
	group, _, ok := strings.Cut(key, "/")
	return ok && (group == ThawGroup || strings.HasSuffix(group, "."+ThawGroup))
}

func oneOfWords(words ...string) func(string, Limits) string {
	return func(value string, _ Limits) string {
		if slices.Contains(words, value) {
			return ""
		}
		return strings.Join(words, " or ")
	}
}

func durationWithin(low, high time.Duration) func(string, Limits) string {
	return func(value string, _ Limits) string {
		if d, err := time.ParseDuration(value); err == nil && low <= d && d <= high {
			return ""
		}
		return fmt.Sprintf("a duration from %v to %v", low, high)
	}
}

func checkTimeout(value string, l Limits) string {
	return durationWithin(MinRouteTimeout, time.Duration(l.MaxTimeoutSeconds)*time.Second)(value, l)
}

func checkSticky(value string, _ Limits) string {
	if _, ok := parseSticky(value); ok {
		return ""
	}
	return "cookie or header:NAME, the name of a header of the request"
}

func checkSubnetRef(value string, _ Limits) string {
	if _, _, ok := SplitSubnet(value); ok {
		return ""
	}
	return "VPC/SUBNET, the names of a VPC and of a subnet in it"
}

func checkQueueRequests(value string, _ Limits) string {
	if n, err := strconv.Atoi(value); err == nil && 1 <= n && n <= MaxQueueRequests {
		return ""
	}
	return fmt.Sprintf("a number from 1 to %d", MaxQueueRequests)
}

func checkFrozenMax(value string, _ Limits) string {
	if n, err := strconv.Atoi(value); err == nil && 0 <= n && n <= MaxFrozen {
		return ""
	}
	return fmt.Sprintf("a number from 0 to %d", MaxFrozen)
}

func checkQueueBytes(value string, _ Limits) string {
	if _, ok := wholeQuantity(value); ok {
		return ""
	}
	return "a quantity of bytes of at least 1Ki, such as 64Mi"
}

func wholeQuantity(value string) (int64, bool) {
	f, err := Quantity(value).Value()
	if err != nil || f < 1<<10 || f > math.MaxInt64/2 {
		return 0, false
	}
	return int64(f), true
}

// Sticky says what requests have in common that should go to one instance. The zero value: nothing.
type Sticky struct {
	Cookie bool   // a cookie of ours, which the first answer sets
	Header string // the name of a header, as it is spelt in the annotation
}

func parseSticky(value string) (Sticky, bool) {
	if value == "cookie" {
		return Sticky{Cookie: true}, true
	}
	name, ok := strings.CutPrefix(value, "header:")
	if !ok || name == "" || len(name) > 128 {
		return Sticky{}, false
	}
	for i := range len(name) {
		if c := name[i]; !('a' <= c|0x20 && c|0x20 <= 'z' || '0' <= c && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0) {
			return Sticky{}, false
		}
	}
	return Sticky{Header: name}, true
}

// Sticky is what the revision's annotation asks for.
func (r *Revision) Sticky() Sticky {
	s, _ := parseSticky(r.Annotations[AnnotationSticky])
	return s
}

// SlowStart is how long a fresh instance of the revision is spared; ok is false when the revision does not say.
func (r *Revision) SlowStart() (d time.Duration, ok bool) {
	d, err := time.ParseDuration(r.Annotations[AnnotationSlowStart])
	return d, err == nil && d >= 0
}

// Frozen is for how long, and how many of the revision's idle instances are kept frozen; what the revision does not say is d and n.
func (r *Revision) Frozen(d time.Duration, n int) (time.Duration, int) {
	if v, err := time.ParseDuration(r.Annotations[AnnotationFrozenFor]); err == nil && v >= 0 {
		d = v
	}
	if v, err := strconv.Atoi(r.Annotations[AnnotationFrozenMax]); err == nil && v >= 0 {
		n = v
	}
	return d, n
}

// QueueBounds are the bounds of the queue in front of the revision's instances, in count, bytes and age; 0 = the revision does not say.
func (r *Revision) QueueBounds() (requests int, bytes int64, wait time.Duration) {
	requests, _ = strconv.Atoi(r.Annotations[AnnotationQueueMaxRequests])
	bytes, _ = wholeQuantity(r.Annotations[AnnotationQueueMaxBytes])
	wait, _ = time.ParseDuration(r.Annotations[AnnotationQueueMaxWait])
	return max(requests, 0), bytes, max(wait, 0)
}

// Timeouts bound a function's work on one request; the clock starts when the function is sent the request. 0 = no limit.
type Timeouts struct {
	Total         time.Duration // to the last byte of the answer
	ResponseStart time.Duration // to the first byte of the answer
	Idle          time.Duration // between two bytes of the answer
}

// And returns the limits that hold where both do: the shorter of each.
func (t Timeouts) And(o Timeouts) Timeouts {
	return Timeouts{shorter(t.Total, o.Total), shorter(t.ResponseStart, o.ResponseStart), shorter(t.Idle, o.Idle)}
}

func shorter(a, b time.Duration) time.Duration {
	if a <= 0 || b > 0 && b < a {
		return b
	}
	return a
}

// RouteTimeouts are the limits in the annotations of a Service, a Route or a DomainMapping.
func RouteTimeouts(ann map[string]string) (t Timeouts) {
	for key, d := range map[string]*time.Duration{AnnotationTimeout: &t.Total, AnnotationResponseStartTimeout: &t.ResponseStart, AnnotationIdleTimeout: &t.Idle} {
		if v, err := time.ParseDuration(ann[key]); err == nil && v > 0 {
			*d = v
		}
	}
	return t
}
