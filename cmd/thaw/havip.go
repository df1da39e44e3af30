package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
	"github.com/thawrun/thaw/netproxy/ctsync"
	"github.com/thawrun/thaw/netproxy/havip"
)

// newHAVIPCommand is `thaw havip`.
func newHAVIPCommand(env *verbs.Env) *cobra.Command {
	var f havipFlags
	cmd := &cobra.Command{
		Use:   "havip --priority N --vip ADDR/LEN@DEV --sync DEV,LOCAL,PEER",
		Short: "Keep addresses, and the connections through them, on one of two routers",
		Long: `Runs on two Linux routers and keeps the given addresses on the one with the higher priority that is well; the other takes over
within 3 to 4 advert intervals, and connections go on, because their state (TCP, UDP and ICMP, with translations) is replicated. Adverts are
VRRPv3 (RFC 5798) and leave on the device of the first --vip; when any of the devices named there loses its link, the addresses move at once. It
takes the place of keepalived and conntrackd. See netproxy.md; translation rules are yours and should be fully-random or not keep ports. It
needs CAP_NET_ADMIN and CAP_NET_RAW, and to be on time CAP_SYS_NICE and CAP_IPC_LOCK. One line is printed for each change of role. On
SIGTERM it hands the addresses over before it ends.`,
		Example: "  thaw havip --priority 200 --advert 10ms --vip 10.1.0.1/24@eth0 --vip 10.2.0.10/24@eth1 --sync eth2,10.9.0.1,10.9.0.2",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.config()
			if err != nil {
				return &verbs.Failure{Err: err, Next: "thaw havip --help", Code: verbs.ExitUsage}
			}
			cfg.Out = env.Stdout
			return havip.Run(cmd.Context(), cfg)
		},
	}
	fs := cmd.Flags()
	fs.IntVar(&f.cfg.Priority, "priority", 0, "1 to 254; the higher one has the addresses when both are well")
	fs.DurationVar(&f.cfg.Advert, "advert", time.Second, "interval of adverts, 10ms to 40.95s in steps of 10ms; the peer takes over after 3 to 4 of them; the same on both")
	fs.StringArrayVar(&f.vips, "vip", nil, "address that moves, as ADDR/LEN@DEV; may be repeated; adverts leave on the first one's device, every named device is watched")
	fs.StringVar(&f.sync, "sync", "", "link to the peer for the replication of connections, as DEV,LOCAL,PEER")
	fs.IntVar(&f.port, "sync-port", ctsync.Port, "UDP port of the replication on both sides")
	fs.BoolVar(&f.cfg.Replicate, "replicate", true, "replicate connections; without it they break when the addresses move")
	fs.IntVar(&f.cfg.Router, "vrid", 51, "1 to 255; tells several pairs on one network apart; the same on both")
	fs.BoolVar(&f.cfg.Stay, "nopreempt", false, "do not take over from a peer of lower priority that is well")
	fs.DurationVar(&f.cfg.Settle, "settle", 2*time.Second, "how long links have to be back before a peer that is well is taken over from; 0 to 10m")
	fs.StringVar(&f.key, "key-file", "", "file with a secret of at least 16 bytes, the same on both: adverts and replication are signed, and unsigned ones refused")
	fs.StringVar(&f.cfg.Status, "status", "", "path of a Unix socket at which each connection gets the state as a line of JSON")
	return cmd
}

type havipFlags struct {
	cfg       havip.Config
	vips      []string
	sync, key string
	port      int
}

// config checks the flags.
func (f *havipFlags) config() (havip.Config, error) {
	cfg := f.cfg
	var errs []error
	for _, s := range f.vips {
		v, err := havip.ParseVIP(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("--vip: %w", err))
		}
		cfg.VIPs = append(cfg.VIPs, v)
	}
	if f.sync != "" {
		var err error
		if cfg.Sync, err = havip.ParseSync(f.sync); err != nil {
			errs = append(errs, fmt.Errorf("--sync: %w", err))
		}
	}
	cfg.Sync.Port = f.port
	if f.key != "" {
		var err error
		if cfg.Key, err = os.ReadFile(f.key); err != nil {
			errs = append(errs, fmt.Errorf("--key-file: %w", err))
		} else if len(cfg.Key) == 0 {
			errs = append(errs, fmt.Errorf("--key-file: %s is empty", f.key))
		}
	}
	if len(errs) > 0 {
		return cfg, errors.Join(errs...)
	}
	return cfg, cfg.Validate()
}
