package apiserver

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/thawrun/thaw/api"
)

// maxUsers bounds how many users of an object a refusal names.
const maxUsers = 5

// isNeighbour says that objects of a kind have to get on with others.
func isNeighbour(k *api.Kind) bool { return group(k) == api.NetGroup }

// neighbours reads what an object of a namespace has to get on with. Revisions only use such objects, so they are read for deletions alone.
func (s *Server) neighbours(ctx context.Context, namespace string, revisions bool) (*api.Neighbours, error) {
	n := &api.Neighbours{}
	for _, k := range api.NeighbourKinds {
		if k == api.Revisions && !revisions {
			continue
		}
		in := namespace
		if k == api.ElasticIPs {
			in = "" // a public address is of the whole installation
		}
		list, _, err := s.store.List(ctx, k, in)
		if err != nil {
			return nil, fromStore(err, k, "")
		}
		for _, o := range list {
			n.Add(o)
		}
	}
	return n, nil
}

// settle checks an admitted object against its neighbours. Until release is called no other one can be stored, so that of two subnets that
// overlap one is refused; a second server's writes are judged by the reconcilers.
func (s *Server) settle(ctx context.Context, o api.Object) (release func(), err error) {
	k, m := api.KindOf(o), o.Meta()
	if !isNeighbour(k) {
		return func() {}, nil
	}
	s.settling.Lock()
	n, err := s.neighbours(ctx, m.Namespace, false)
	if err == nil {
		if errs := n.Conflicts(o); len(errs) > 0 {
			err = invalid(k, m.Name, errs)
		}
	}
	if err != nil {
		s.settling.Unlock()
		return nil, err
	}
	return s.settling.Unlock, nil
}

// unused refuses the deletion of an object that others cannot do without. Until release is called nothing can come to need it.
func (s *Server) unused(ctx context.Context, k *api.Kind, namespace, name string) (release func(), err error) {
	if !isNeighbour(k) {
		return func() {}, nil
	}
	s.settling.Lock()
	err = s.checkUnused(ctx, k, namespace, name)
	if err != nil {
		s.settling.Unlock()
		return nil, err
	}
	return s.settling.Unlock, nil
}

func (s *Server) checkUnused(ctx context.Context, k *api.Kind, namespace, name string) error {
	o, err := s.store.Get(ctx, k, namespace, name)
	if err != nil {
		return fromStore(err, k, name)
	}
	n, err := s.neighbours(ctx, namespace, true)
	if err != nil {
		return err
	}
	users := n.Users(o)
	if len(users) == 0 {
		return nil
	}
	if more := len(users) - maxUsers; more > 0 {
		users = append(slices.Clone(users[:maxUsers]), fmt.Sprintf("%d more", more))
	}
	return conflict(k, name, "it is in use by "+strings.Join(users, ", "))
}
