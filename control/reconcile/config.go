package reconcile

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
)

// Config holds the settings of the reconcilers. Zero values mean the defaults named at each field.
type Config struct {
	// Domain is what public hosts end in: NAME.NAMESPACE.Domain. Default "localhost".
	Domain string
	// ClusterDomain is what private hosts end in: NAME.NAMESPACE.svc.ClusterDomain. Default "cluster.local".
	ClusterDomain string
	// URLPort is the port that public URLs in the status name, so that they can be clicked. 0 and 80 are left out.
	URLPort int

	// Workers is how many keys are worked on at once. Default 4.
	Workers int
	// Resolvers is how many images are resolved at once. Default 4.
	Resolvers int
	// ResolveTimeout bounds one resolution of an image. Default 60 s.
	ResolveTimeout time.Duration
	// StoreTimeout bounds one call to the store, so that a lost store does not hold workers for ever. Default 10 s.
	StoreTimeout time.Duration

	// StatusInterval is the least time between two writes of a revision's replica counts and of its condition Active.
	// Default 1 s. Readiness is written at once.
	StatusInterval time.Duration
	// StartupGrace is how long after the start a revision that the stored status calls active may be without any report
	// before it is taken to have no instance. Default 10 s.
	StartupGrace time.Duration
	// MaxStartFailures is how many starts in a row may fail before a revision that never was ready is marked as failed.
	// Default 3.
	MaxStartFailures int
	// ProgressDeadline is how long a new revision may take to get ready; the annotation
	// serving.knative.dev/progress-deadline of a revision goes before it. Default 600 s.
	ProgressDeadline time.Duration

	// RolloutDuration is the time in which the latest revision takes over; the annotation
	// serving.knative.dev/rollout-duration of a route goes before it. Default 0: at once.
	RolloutDuration time.Duration

	// Prepare is told that the share weight, in (0, 1], of the requests of one revision is about to go to another one, and says whether
	// that has the instances for it. Until it does, and for PrepareWait at most, a route stays as it is. Default: nothing is waited for.
	Prepare func(from, to api.RevisionID, weight float64) (ready bool)
	// PrepareWait bounds how long a change of a route waits for Prepare. Default 10 s.
	PrepareWait time.Duration

	// GC says which revisions are forgotten. The zero value means DefaultGC; to switch collection off set Disabled.
	GC GC

	// Network makes pairs of gateways, for functions that join a subnet. nil: there is none, and such functions do not get ready.
	Network Network
	// FirstKey and LastKey bound the keys of subnets, of 32 bits and never 0. Default 1 to 2^24-1, which tunnels of every kind can carry.
	FirstKey, LastKey uint32
	// MaxPairs bounds the number of gateways, and their IDs. Default 50,000.
	MaxPairs int
	// GatewayLinger is how long a gateway stays after the last function of its subnet. Default 1 h; negative: it goes at once.
	GatewayLinger time.Duration
	// GatewayTimeout bounds one call to the network. Default 60 s.
	GatewayTimeout time.Duration

	// Log gets what happens. Default: nothing is logged.
	Log *slog.Logger
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// GC says when a revision that no route leads to may be deleted. The numbers and their order are Knative's (config-gc).
type GC struct {
	// Disabled keeps every revision.
	Disabled bool
	// RetainSinceCreate keeps a revision that is younger. Negative: age is no reason to keep it.
	RetainSinceCreate time.Duration
	// RetainSinceLastActive keeps a revision that a route led to within this time. Negative: no reason to keep it.
	RetainSinceLastActive time.Duration
	// MinIdle keeps the newest so many idle revisions of a configuration, whatever their age.
	MinIdle int
	// MaxIdle is the cap on idle revisions of a configuration: what is above it goes, whatever its age. Negative: no cap.
	MaxIdle int
}

// DefaultGC is what Knative ships: 48 h, 15 h, 20 and 1000.
var DefaultGC = GC{RetainSinceCreate: 48 * time.Hour, RetainSinceLastActive: 15 * time.Hour, MinIdle: 20, MaxIdle: 1000}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

func (c Config) withDefaults() Config {
	orDefault(&c.Domain, "localhost")
	orDefault(&c.ClusterDomain, "cluster.local")
	orDefault(&c.Workers, 4)
	orDefault(&c.Resolvers, 4)
	orDefault(&c.ResolveTimeout, 60*time.Second)
	orDefault(&c.StoreTimeout, 10*time.Second)
	orDefault(&c.StatusInterval, time.Second)
	orDefault(&c.StartupGrace, 10*time.Second)
	orDefault(&c.MaxStartFailures, 3)
	orDefault(&c.ProgressDeadline, 600*time.Second)
	orDefault(&c.PrepareWait, 10*time.Second)
	orDefault(&c.GC, DefaultGC)
	orDefault(&c.FirstKey, 1)
	orDefault(&c.LastKey, 1<<24-1)
	orDefault(&c.MaxPairs, 50_000)
	orDefault(&c.GatewayLinger, time.Hour)
	orDefault(&c.GatewayTimeout, time.Minute)
	orDefault(&c.Log, slog.New(slog.DiscardHandler))
	if c.Now == nil {
		c.Now = time.Now
	}
	c.Domain = strings.ToLower(c.Domain)
	c.ClusterDomain = strings.ToLower(c.ClusterDomain)
	return c
}

// Validate says what is wrong with the settings, all of it at once.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(!strings.HasPrefix(c.Domain, ".") && !strings.HasSuffix(c.Domain, "."), "domain %q begins or ends with a dot", c.Domain)
	check(c.Domain != c.ClusterDomain && c.Domain != "svc."+c.ClusterDomain, "domain %q is the cluster domain: public and private hosts would be the same", c.Domain)
	check(c.URLPort >= 0 && c.URLPort <= 65535, "port %d of URLs is outside 0..65535", c.URLPort)
	check(c.Workers > 0, "workers %d: at least 1 is needed", c.Workers)
	check(c.Resolvers > 0, "resolvers %d: at least 1 is needed", c.Resolvers)
	check(c.MaxStartFailures > 0, "max start failures %d: at least 1 is needed", c.MaxStartFailures)
	check(c.RolloutDuration >= 0, "rollout duration %v is negative", c.RolloutDuration)
	check(c.GC.MinIdle >= 0, "gc: %d revisions to keep is negative", c.GC.MinIdle)
	check(c.GC.MaxIdle < 0 || c.GC.MaxIdle >= c.GC.MinIdle, "gc: the cap %d is below the %d revisions to keep", c.GC.MaxIdle, c.GC.MinIdle)
	check(c.FirstKey <= c.LastKey, "keys of subnets: the first, %d, is above the last, %d", c.FirstKey, c.LastKey)
	check(c.MaxPairs > 0, "at most %d gateways: at least 1 is needed", c.MaxPairs)
	for what, d := range map[string]time.Duration{"resolve timeout": c.ResolveTimeout, "store timeout": c.StoreTimeout,
		"status interval": c.StatusInterval, "startup grace": c.StartupGrace, "progress deadline": c.ProgressDeadline, "prepare wait": c.PrepareWait, "gateway timeout": c.GatewayTimeout} {
		check(d > 0, "%s %v is not positive", what, d)
	}
	return errors.Join(errs...)
}
