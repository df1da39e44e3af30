package havip

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/thawrun/thaw/netproxy/ctsync"
)

// Status is what the status socket answers.
type Status struct {
	Role      Role          `json:"role"`
	Reason    string        `json:"reason"` // of the last change of role
	Term      uint64        `json:"term"`
	Full      bool          `json:"full"`    // the table of connections is full: it may take over
	Refused   uint64        `json:"refused"` // adverts that were malformed, unsigned or old
	Entries   int           `json:"entries"` // of the kernel's table
	Replicate *ctsync.Stats `json:"replication,omitempty"`
	Sites     []SiteStatus  `json:"sites,omitempty"`
}

// SiteStatus is what is known of a site.
type SiteStatus struct {
	Name      string        `json:"name"`
	Link      bool          `json:"link"` // its devices have one
	Full      bool          `json:"full"`
	InStep    bool          `json:"inStep"` // and the peer, which replicates it, is heard
	Entries   int           `json:"entries"`
	Replicate *ctsync.Stats `json:"replication,omitempty"`
}

// Status returns what is true now.
func (m *Member) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.now
	now := time.Now()
	for _, o := range m.sites {
		t := SiteStatus{Name: o.Name, Link: o.linked()}
		t.Full, t.InStep = o.full(now, m.linksAt)
		if o.sync != nil {
			st := o.sync.State()
			t.Entries, t.Replicate = st.Entries, &st.Stats
		}
		s.Sites = append(s.Sites, t)
	}
	return s
}

// tell says a change of role, and keeps the status current.
func (m *Member) tell(now time.Time) {
	role, reason := m.engine.Role()
	m.now = Status{Role: role, Reason: reason, Term: m.engine.Known(), Full: m.facts(now).Full, Refused: m.refused}
	if m.home.sync != nil {
		st := m.home.sync.State()
		m.now.Entries, m.now.Replicate = st.Entries, &st.Stats
	}
	if role != m.told {
		m.told = role
		m.say("havip role=%s reason=%q term=%d full=%t entries=%d", role, reason, m.now.Term, m.now.Full, m.now.Entries)
	}
}

// statusServer answers each connection with one line and ends it.
type statusServer struct {
	l   net.Listener
	now func() Status
}

func listenStatus(path string, now func() Status) (*statusServer, error) {
	// A socket that a killed member left behind is in nobody's way; one that answers is.
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("status socket %s: another member answers there", path)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode()&fs.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("status socket: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	return &statusServer{l, now}, nil
}

// run serves until done is closed.
func (s *statusServer) run(done <-chan struct{}) error {
	go func() {
		<-done
		s.l.Close()
	}()
	for {
		c, err := s.l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("status socket: %w", err)
		}
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		_ = json.NewEncoder(c).Encode(s.now())
		c.Close()
	}
}
