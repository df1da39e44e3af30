package autoscaler

import "time"

// Activity is the stage that a revision's Active condition shows.
type Activity uint8

// The activities. Inactive does not mean that no instance runs: the last ones stay for the grace period.
const (
	Inactive   Activity = iota // no traffic
	Activating                 // wanted, but not enough instances are ready
	Active                     // as many instances are ready as activity needs
)

func (a Activity) String() string { return [...]string{"inactive", "activating", "active"}[a] }

// Mode is where Knative would send a revision's requests.
type Mode uint8

// The modes.
const (
	Proxy Mode = iota // through the activator
	Serve             // straight to the instances
)

func (m Mode) String() string { return [...]string{"proxy", "serve"}[m] }

// activationSlack is how much longer than the progress deadline an activation may take before it is given up.
const activationSlack = 30 * time.Second

// unknown stands for a number of instances that nothing is known about.
const unknown = -1

// Life is where a revision stands on its way between zero and many: what Settle returned the last time.
type Life struct {
	Activity  Activity
	Since     time.Time // of Activity
	Reached   bool      // as many instances as initial-scale asks for were ready once, or that was given up
	Mode      Mode
	ModeSince time.Time
	FreeSince time.Time // since when the excess burst capacity has been there; zero = it is not
}

// NewLife is the life of a revision that has just become known. healthy says that it was ready before: its initial scale
// does not have to be reached again.
func NewLife(now time.Time, p Policy, healthy bool) Life {
	l := Life{Since: now, Reached: healthy, ModeSince: now}
	floor, _ := p.floor(l)
	if floor > 0 {
		l.Activity = Activating
	}
	l.Reached = l.Reached || floor == 0
	return l
}

// Standing is what there is of a revision when Settle is asked.
type Standing struct {
	Ready               int
	Starting            int
	ExcessBurstCapacity int
	Hopeless            bool // starts fail, nothing runs or starts, and nobody has asked for a stable window
}

// Verdict is what to do.
type Verdict struct {
	Order int       // instances to have; -1 = whatever there is stays
	Want  int       // what status shows as desired: 0 for an inactive revision even while its last instance stays; -1 = unknown
	Wake  time.Time // ask again then, even if nothing happens; zero = no need
	Why   Why
}

// Settle applies to a wanted number of instances (-1: unknown) what comes after the load's answer: initial scale, min scale, max
// scale, then the rules for going to zero. It is pure. A revision goes to zero in steps: active for at least a stable window, then
// inactive, then without instances once it has been inactive for the grace period and the retention, or in proxy mode for
// the grace period with the retention over.
func Settle(now time.Time, p Policy, want int, s Standing, l Life) (Verdict, Life) {
	for {
		v := l.verdict(now, &p, want, s)
		next := l.moved(now, &p, v.Want, s)
		if next.Activity == l.Activity || v.Order != unknown {
			return v, next
		}
		l = next // becoming inactive may allow the last step at once
	}
}

func (l Life) verdict(now time.Time, p *Policy, want int, s Standing) Verdict {
	if s.Hopeless {
		want = 0
	}
	floor, why := p.floor(l.givenUp(now, p))
	if want < 0 && l.Activity != Activating {
		if s.Ready+s.Starting < floor {
			return Verdict{Order: floor, Want: floor, Why: why}
		}
		return Verdict{Order: unknown, Want: unknown, Why: WhyUnknown}
	}
	v := Verdict{Order: max(0, want)}
	if v.Order < floor {
		v.Order, v.Why = floor, why
	}
	if p.MaxScale > 0 && v.Order > p.MaxScale {
		v.Order, v.Why = p.MaxScale, WhyMaxScale
	}
	v.Want = v.Order
	if v.Order > 0 {
		return v
	}
	return l.zero(now, p, s)
}

// floor is the least number of instances: min-scale, and initial-scale until it was reached. max-scale wins over both; Knative would
// let an initial scale above it through.
func (p *Policy) floor(l Life) (int, Why) {
	n, why := p.LeastScale(), WhyMinScale
	if p.Reachable && !l.Reached && p.InitialScale > n {
		n, why = p.InitialScale, WhyInitialScale
	}
	if p.MaxScale > 0 && n > p.MaxScale {
		n = p.MaxScale
	}
	return n, why
}

// givenUp is l without the claim to an initial scale when that was not reached in time.
func (l Life) givenUp(now time.Time, p *Policy) Life {
	if l.Activity == Activating && !l.Reached && !now.Before(l.deadline(p)) {
		l.Reached = true
	}
	return l
}

func (l Life) deadline(p *Policy) time.Time { return l.Since.Add(p.ProgressDeadline + activationSlack) }

// zero says how far a revision that nothing asks for is on its way to zero.
func (l Life) zero(now time.Time, p *Policy, s Standing) Verdict {
	if !p.EnableScaleToZero {
		return Verdict{Order: 1, Want: 1, Why: WhyScaleToZeroOff}
	}
	switch {
	case l.Activity != Activating && p.Predictive: // the planner has weighed how long an idle instance is worth keeping
		return Verdict{Why: WhyIdle}
	case l.Activity == Activating:
		if s.Hopeless || !now.Before(l.deadline(p)) {
			return Verdict{Why: WhyActivationFailed}
		}
		return Verdict{Order: unknown, Want: unknown, Wake: l.deadline(p), Why: WhyActivating}
	case l.Activity == Active:
		if end := l.Since.Add(p.StableWindow); now.Before(end) {
			return Verdict{Order: 1, Want: 1, Wake: end, Why: WhyActiveHold}
		}
		return Verdict{Order: unknown, Why: WhyIdle} // becomes inactive; its instances stay for now
	}
	return l.last(now, p, s)
}

// last says when an inactive revision gives up its last instances.
func (l Life) last(now time.Time, p *Policy, s Standing) Verdict {
	if s.Ready == 0 {
		return Verdict{Why: WhyIdle} // nothing is left that a grace period could be for
	}
	if end := l.Since.Add(p.Retention); now.Before(end) {
		return Verdict{Order: unknown, Wake: end, Why: WhyRetention}
	}
	end := l.Since.Add(p.GracePeriod)
	if l.Mode == Proxy {
		end = earlier(end, l.ModeSince.Add(p.GracePeriod))
	}
	if now.Before(end) {
		return Verdict{Order: unknown, Wake: end, Why: WhyGrace}
	}
	return Verdict{Why: WhyIdle}
}

// moved is the life after a verdict. The thresholds are those of Knative's Active condition.
func (l Life) moved(now time.Time, p *Policy, want int, s Standing) Life {
	l = l.path(now, p, want, s)
	enough, _ := p.floor(l)
	if l.Reached {
		enough = max(1, enough)
	}
	activity := l.Activity
	switch {
	case want == 0 || enough == 0:
		activity = Inactive
		l.Reached = true // an initial scale of zero, or one that was given up
	case want == unknown && l.Activity == Inactive:
	case s.Ready < enough:
		activity = Activating
	default:
		activity = Active
	}
	l.Reached = l.Reached || s.Ready >= enough
	if activity != l.Activity {
		l.Activity, l.Since = activity, now
	}
	return l
}

// path chooses the mode. To serve mode it goes only after the excess burst capacity has been there for serve-delay: a load around the
// border would else change the mode with each decision. At a target burst capacity of 0 the mode is a matter of having an instance, and
// nothing is waited for.
func (l Life) path(now time.Time, p *Policy, want int, s Standing) Life {
	mode := Serve
	switch {
	case want == 0 || s.Ready == 0 || s.ExcessBurstCapacity < 0 || want == unknown && l.Activity == Inactive:
		mode, l.FreeSince = Proxy, time.Time{}
	case l.FreeSince.IsZero():
		l.FreeSince = now
	}
	if mode == Serve && l.Mode == Proxy && p.TargetBurstCapacity > 0 && now.Sub(l.FreeSince) < p.ServeDelay {
		mode = Proxy
	}
	if mode != l.Mode {
		l.Mode, l.ModeSince = mode, now
	}
	return l
}

// earlier is the earlier of two times, where zero means never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// initialExcessBurstCapacity is what counts before the first decision: that of the initial scale without load.
func initialExcessBurstCapacity(p Policy) int {
	if p.TargetBurstCapacity <= 0 {
		return int(p.TargetBurstCapacity)
	}
	return toInt(float64(p.InitialScale)*p.Total - p.TargetBurstCapacity)
}
