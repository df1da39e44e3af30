package state

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"go.etcd.io/etcd/server/v3/embed"
)

// MemberConfig is one member of an etcd cluster that runs as a process of its own. Name, Dir, Client and Peer are required.
type MemberConfig struct {
	Name   string
	Dir    string // data directory, made (0700) if it is missing
	Client string // host:port to listen on for clients
	Peer   string // host:port to listen on for the other members
	// Advertise is the host under which clients and members reach this one; empty = the host of Client and of Peer.
	Advertise string
	// Cluster has all first members as NAME=HOST:PORT of Peer; empty = this one alone. It counts only as long as Dir is empty.
	Cluster          []string
	HistoryRevisions int64 // as Config's
	QuotaBytes       int64 // as Config's
	Log              *slog.Logger
}

// Settings of a member that has others over a network: etcd's own defaults, which suit round trips up to 10 ms.
const (
	clusterTickMs     = 100
	clusterElectionMs = 1000
	clusterEntries    = 10_000 // raft log entries kept in memory for members that are behind
)

func (c MemberConfig) advertise(addr string) (url.URL, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return url.URL{}, fmt.Errorf("%w: address %q: %w", ErrConfig, addr, err)
	}
	if c.Advertise != "" {
		host = c.Advertise
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return url.URL{}, fmt.Errorf("%w: others cannot connect to %q: name this machine's address", ErrConfig, addr)
	}
	return url.URL{Scheme: "http", Host: net.JoinHostPort(host, port)}, nil
}

func (c MemberConfig) config(quiet *atomic.Bool) (*embed.Config, error) {
	if c.Name == "" || c.Dir == "" || c.Client == "" || c.Peer == "" {
		return nil, fmt.Errorf("%w: a member needs a name, a data directory, and addresses for clients and members", ErrConfig)
	}
	client, err := c.advertise(c.Client)
	if err != nil {
		return nil, err
	}
	peer, err := c.advertise(c.Peer)
	if err != nil {
		return nil, err
	}
	defaults := Config{HistoryRevisions: c.HistoryRevisions, QuotaBytes: c.QuotaBytes, Log: c.Log}.withDefaults()
	e := embed.NewConfig()
	e.Name, e.Dir = c.Name, c.Dir
	e.ListenClientUrls = []url.URL{{Scheme: "http", Host: c.Client}}
	e.ListenPeerUrls = []url.URL{{Scheme: "http", Host: c.Peer}}
	e.AdvertiseClientUrls, e.AdvertisePeerUrls = []url.URL{client}, []url.URL{peer}
	e.InitialCluster = c.Name + "=" + peer.String()
	if len(c.Cluster) > 0 {
		if e.InitialCluster, err = initialCluster(c.Cluster); err != nil {
			return nil, err
		}
	}
	e.TickMs, e.ElectionMs = clusterTickMs, clusterElectionMs
	if len(c.Cluster) <= 1 {
		e.TickMs, e.ElectionMs = tickMs, electionMs
	}
	e.SnapshotCount, e.SnapshotCatchUpEntries = clusterEntries, clusterEntries/2
	e.AutoCompactionMode, e.AutoCompactionRetention = embed.CompactorModeRevision, strconv.FormatInt(defaults.HistoryRevisions, 10)
	e.QuotaBackendBytes = defaults.QuotaBytes
	e.MaxRequestBytes = MaxValueBytes + 512<<10
	e.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapTo(defaults.Log, quiet, nil))
	return e, nil
}

// initialCluster writes NAME=HOST:PORT as etcd wants it.
func initialCluster(members []string) (string, error) {
	var out []string
	for _, m := range members {
		name, addr, ok := strings.Cut(m, "=")
		addr = strings.TrimPrefix(addr, "http://")
		if _, _, err := net.SplitHostPort(addr); !ok || name == "" || err != nil {
			return "", fmt.Errorf("%w: member %q: want NAME=HOST:PORT", ErrConfig, m)
		}
		out = append(out, name+"=http://"+addr)
	}
	return strings.Join(out, ","), nil
}

// RunMember runs a member until ctx ends. ready is called once it serves, with the address for clients. etcd ends the process when it can
// neither read nor write its files: whoever supervises it starts it again.
func RunMember(ctx context.Context, c MemberConfig, ready func(client string)) error {
	var quiet atomic.Bool
	e, err := c.config(&quiet)
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDataDir, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("%w: %w", ErrDataDir, err)
	}
	e.Dir = dir
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	srv, err := embed.StartEtcd(e)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrDataDir, dir, err)
	}
	defer srv.Close()
	defer quiet.Store(true) // before Close: what it says at the end needs no attention
	select {
	case <-srv.Server.ReadyNotify():
	case <-ctx.Done():
		return nil
	case err := <-srv.Err():
		return err
	}
	ready(srv.Clients[0].Addr().String())
	select {
	case <-ctx.Done():
		return nil
	case err := <-srv.Err():
		return err
	case <-srv.Server.StopNotify():
		return errors.New("state: the etcd server has stopped by itself")
	}
}
