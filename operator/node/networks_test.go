package node

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/sluice-network/sluice/internal/host"
)

// What network of a cloud a NIC is on is asked once, again when that failed, and again
// when there is another NIC.
func TestNetworksOfNICs(t *testing.T) {
	simulated(t, func(t *testing.T) {
		r := rigWith(t)
		var asked atomic.Int32
		r.networks = func(context.Context) (map[string]string, error) {
			if asked.Add(1) == 1 {
				return nil, errors.New("no answer")
			}
			return map[string]string{"00:00:5e:00:00:03": "openstack/NetworkID:a", "00:00:5e:00:00:09": "openstack/NetworkID:b"}, nil
		}
		r.kernel.Change(func(pfs []host.PF) { pfs[0].MAC = []byte{2, 0, 0, 0, 0, 1} }) // it is in a bond
		r.start()
		networks := func(one, two string) {
			t.Helper()
			r.eventually(func() error {
				s := r.server.status().Interfaces
				if len(s) != 2 || s[0].NetFilter != one || s[1].NetFilter != two {
					return fmt.Errorf("%+v", s)
				}
				return nil
			})
		}
		networks("openstack/NetworkID:a", "")
		r.ready()
		if n := asked.Load(); n != 2 {
			t.Errorf("asked %d times", n)
		}
		r.kernel.Change(func(pfs []host.PF) { pfs[1].PCIAddress, pfs[1].PermMAC = "0000:09:00.0", []byte{0, 0, 0x5e, 0, 0, 9} })
		r.kernel.Tell(host.Changes{All: true})
		networks("openstack/NetworkID:a", "openstack/NetworkID:b")
		r.eventually(func() error { // beside the work: what was known before is published already
			if n := asked.Load(); n != 3 {
				return fmt.Errorf("asked %d times", n)
			}
			return nil
		})
	})
}
