package api

import (
	"slices"
	"strings"
	"time"
)

// Get returns the condition of a type, nil if there is none. It points into c.
func (c Conditions) Get(typ string) *Condition {
	for i := range c {
		if c[i].Type == typ {
			return &c[i]
		}
	}
	return nil
}

// IsTrue says whether the condition of a type is there and True.
func (c Conditions) IsTrue(typ string) bool {
	v := c.Get(typ)
	return v != nil && v.Status == True
}

// IsFalse says whether the condition of a type is there and False.
func (c Conditions) IsFalse(typ string) bool {
	v := c.Get(typ)
	return v != nil && v.Status == False
}

// Set writes one condition of severity error and keeps the list sorted by type. LastTransitionTime becomes now only when
// the status changes. It says whether anything changed; c's old backing array is not modified, so that objects which
// share it stay as they were.
func (c *Conditions) Set(now time.Time, typ, status, reason, message string) (changed bool) {
	return c.put(now, Condition{Type: typ, Status: status, Reason: reason, Message: message})
}

// SetInfo is Set for a condition that tells something but is no part of Ready, such as Active.
func (c *Conditions) SetInfo(now time.Time, typ, status, reason, message string) (changed bool) {
	return c.put(now, Condition{Type: typ, Status: status, Severity: SeverityInfo, Reason: reason, Message: message})
}

// SetWarning is Set for a condition that people should look at although the object works.
func (c *Conditions) SetWarning(now time.Time, typ, status, reason, message string) (changed bool) {
	return c.put(now, Condition{Type: typ, Status: status, Severity: SeverityWarning, Reason: reason, Message: message})
}

func (c *Conditions) put(now time.Time, v Condition) bool {
	// The wire form has whole seconds: cutting here keeps an object equal to itself after a round trip.
	v.LastTransitionTime = Time{now.UTC().Truncate(time.Second)}
	i, found := slices.BinarySearchFunc(*c, v.Type, func(e Condition, t string) int { return strings.Compare(e.Type, t) })
	if !found && !slices.IsSortedFunc(*c, byType) { // written by somebody who did not keep the order
		sorted := slices.Clone(*c)
		slices.SortStableFunc(sorted, byType)
		*c = sorted
		return c.put(now, v)
	}
	if found {
		old := (*c)[i]
		if old.Status == v.Status && !old.LastTransitionTime.IsZero() {
			v.LastTransitionTime = old.LastTransitionTime
		}
		if old == v {
			return false
		}
		next := slices.Clone(*c)
		next[i] = v
		*c = next
		return true
	}
	*c = slices.Insert(slices.Clone(*c), i, v)
	return true
}

// Remove takes the condition of a type away and says whether it was there.
func (c *Conditions) Remove(typ string) bool {
	if c.Get(typ) == nil {
		return false
	}
	*c = slices.DeleteFunc(slices.Clone(*c), func(v Condition) bool { return v.Type == typ })
	return true
}

func byType(a, b Condition) int { return strings.Compare(a.Type, b.Type) }

// Summarise sets the condition typ from the conditions it depends on, as Knative's living condition sets do: the first
// dependent that is False makes it False, else the first that is Unknown or absent makes it Unknown, each with that
// dependent's reason and message; else it is True. "First" is the one that changed last, so that the newest trouble is
// what people read; ties go by the order of deps. It says whether anything changed.
func (c *Conditions) Summarise(now time.Time, typ string, deps ...string) (changed bool) {
	var worst *Condition
	for _, d := range deps {
		v := c.Get(d)
		if v == nil {
			v = &Condition{Type: d, Status: Unknown}
		}
		if v.Status == True {
			continue
		}
		if worst == nil || worse(v, worst) {
			worst = v
		}
	}
	if worst == nil {
		return c.Set(now, typ, True, "", "")
	}
	status := Unknown
	if worst.Status == False {
		status = False
	}
	return c.Set(now, typ, status, worst.Reason, worst.Message)
}

func worse(a, b *Condition) bool {
	if (a.Status == False) != (b.Status == False) {
		return a.Status == False
	}
	return a.LastTransitionTime.After(b.LastTransitionTime.Time)
}

// Equal compares two lists without the times of their transitions.
func (c Conditions) Equal(o Conditions) bool {
	return slices.EqualFunc(c, o, func(a, b Condition) bool {
		a.LastTransitionTime, b.LastTransitionTime = Time{}, Time{}
		return a == b
	})
}
