package autoscaler

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

// Explain says in sentences why the scale is what it is at now: what there is, what load and queues ask for, what shaped that
// number, and which way requests take.
func (s Status) Explain(now time.Time) []string {
	out := []string{s.present()}
	out = append(out, s.asking(now)...)
	out = append(out, s.shaped(now)...)
	out = append(out, s.way())
	if s.Outlook != "" {
		out = append(out, "Planner: "+s.Outlook)
	} else {
		out = append(out, "Planner: none; Knative's rules decide ("+AnnotationPlanner+" is kpa).")
	}
	if s.Failure != nil {
		out = append(out, fmt.Sprintf("The last start failed (%s, %s): %s", s.Failure.Reason, times(s.Failure.Count), s.Failure.Message))
	}
	return out
}

func (s Status) present() string {
	text := fmt.Sprintf("%s wanted: %d ready, %d starting; the revision is %s.", instances(s.Desired), s.Ready, s.Starting, s.Activity)
	if s.Ordered != s.Desired {
		text += fmt.Sprintf(" %s ordered.", instances(s.Ordered))
	}
	return text
}

// asking is what the averages and the queues say.
func (s Status) asking(now time.Time) (out []string) {
	p := s.Policy
	unit := "concurrent requests"
	if p.Metric == RPS {
		unit = "requests a second"
	}
	share := fmt.Sprintf("an instance should carry %s (%s %% of %s)", number(p.Target), number(100*p.Target/p.Total), number(p.Total))
	switch {
	case s.Measured:
		out = append(out, fmt.Sprintf("Load: %s %s over the stable window of %v, %s over the panic window of %v; %s, so the averages ask for %d.",
			number(s.Stable), unit, p.StableWindow, number(s.Panic), p.PanicWindow, share, s.FromLoad))
	case s.Decided.IsZero():
		out = append(out, fmt.Sprintf("There has been no load for longer than the stable window of %v; %s.", p.StableWindow, share))
	default:
		out = append(out, fmt.Sprintf("No report of load came within the stable window of %v; %s.", p.StableWindow, share))
	}
	if s.FromEvents > 0 {
		out = append(out, fmt.Sprintf("Queue: %d waited and %d ran %v ago; queues asked for %d within the last %v, which are kept for as long so that the next burst finds them.",
			s.Waiting, s.Running, now.Sub(s.Asked).Round(100*time.Millisecond), s.FromEvents, p.StableWindow))
	}
	return out
}

// shaped is a sentence for each reason.
func (s Status) shaped(now time.Time) (out []string) {
	for why := s.Why; why != 0; why &= why - 1 {
		i := bits.TrailingZeros32(uint32(why))
		if i < len(whyWords) {
			out = append(out, strings.ToUpper(whyWords[i][:1])+whyWords[i][1:]+": "+s.because(1<<i)+".")
		}
	}
	if s.Wake.After(now) {
		out = append(out, fmt.Sprintf("If nothing happens, it is looked at again in %v.", s.Wake.Sub(now).Round(100*time.Millisecond)))
	}
	return out
}

// because is the meaning of one reason, with the revision's own numbers.
func (s Status) because(w Why) string {
	p := s.Policy
	switch w {
	case WhyNoData:
		return "no report came within the stable window, and silence is not zero: what was decided last stays"
	case WhyStable:
		return "the number follows from the average over the stable window"
	case WhyPanic:
		return fmt.Sprintf("the short window asks for at least %s times the ready instances, so it decides", number(p.PanicThreshold))
	case WhyPanicHold:
		return fmt.Sprintf("in panic mode the number does not fall; it ends %v after the last surge", p.StableWindow)
	case WhyUpRate:
		return fmt.Sprintf("max-scale-up-rate allows at most %s times the ready instances in one decision", number(p.MaxScaleUpRate))
	case WhyDownRate:
		return fmt.Sprintf("max-scale-down-rate takes away at most to 1/%s of the ready instances in one decision", number(p.MaxScaleDownRate))
	case WhyActivationScale:
		return fmt.Sprintf("any number above zero is raised to activation-scale %d", p.ActivationScale)
	case WhyScaleDownDelay:
		return fmt.Sprintf("more was wanted within the scale-down-delay of %v", p.ScaleDownDelay)
	case WhyEvent:
		return "the length of the queue asked for it"
	case WhyInitialScale:
		return fmt.Sprintf("initial-scale %d has not been reached yet", p.InitialScale)
	case WhyMinScale:
		return fmt.Sprintf("min-scale is %d", p.MinScale)
	case WhyMaxScale:
		return fmt.Sprintf("max-scale is %d", p.MaxScale)
	case WhyScaleToZeroOff:
		return "enable-scale-to-zero is false: one instance stays"
	case WhyActivating:
		return fmt.Sprintf("instances are being started; this is given up after progress-deadline (%v) and %v", p.ProgressDeadline, activationSlack)
	case WhyActiveHold:
		return fmt.Sprintf("nothing asks, but the revision has been active for less than the stable window of %v", p.StableWindow)
	case WhyGrace:
		return fmt.Sprintf("nothing asks; the last instances go after scale-to-zero-grace-period (%v)", p.GracePeriod)
	case WhyRetention:
		return fmt.Sprintf("nothing asks; the last instances go after scale-to-zero-pod-retention-period (%v)", p.Retention)
	case WhyIdle:
		return "nothing asks"
	case WhyActivationFailed:
		return "no instance got ready in time, or starts fail and nobody waits"
	case WhyBackOff:
		return "more is asked for, but starts fail: one instance tries on"
	case WhyStartRate:
		return fmt.Sprintf("more is wanted; at most %s may be started at once, then %s a second (start-burst, start-rate)", number(p.StartBurst), number(p.StartRate))
	case WhyAdopted:
		return "these instances were found after a start of the autoscaler, and no report has come yet"
	case WhyPlanner:
		return "the planner keeps these, or starts them ahead of what it expects"
	case WhyUnknown:
		return "nothing was decided yet: what there is stays"
	}
	return "no words for it"
}

// way is where requests go.
func (s Status) way() string {
	p := s.Policy
	text := fmt.Sprintf("Path: %s. ", s.Mode)
	switch burst := p.TargetBurstCapacity; {
	case s.Ready == 0:
		return text + "No instance is ready: requests wait at the activator for one."
	case burst < 0:
		return text + "Target burst capacity -1: always through the activator."
	case burst == 0:
		return text + "Target burst capacity 0: through the activator only while no instance is ready."
	case s.Mode == Proxy && s.ExcessBurstCapacity >= 0:
		return text + fmt.Sprintf("The burst capacity of %s is there (%d more); straight to the instances once it has been for %v.", number(burst), s.ExcessBurstCapacity, p.ServeDelay)
	case s.ExcessBurstCapacity >= 0:
		return text + fmt.Sprintf("The instances can take the load, a burst of %s, and %d more.", number(burst), s.ExcessBurstCapacity)
	}
	return text + fmt.Sprintf("The instances lack %d to take the load and a burst of %s; Knative would put %d activators in front.", max(0, -s.ExcessBurstCapacity), number(p.TargetBurstCapacity), s.Activators)
}

func instances(n int) string {
	if n == 1 {
		return "1 instance is"
	}
	return strconv.Itoa(n) + " instances are"
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return strconv.Itoa(n) + " times in a row"
}

// number is v with at most two decimals.
func number(v float64) string { return strconv.FormatFloat(math.Round(v*100)/100, 'f', -1, 64) }
