//go:build kube134

package conformance

import (
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
)

// In Kubernetes 1.34 all providers share one clock, a plain variable that their goroutines read at any time: it is set
// once, before they exist, and looks here.
var movedClock atomic.Pointer[func() time.Time]

func init() {
	kmsv2.NowFunc = func() time.Time {
		if now := movedClock.Load(); now != nil {
			return (*now)()
		}
		return time.Now()
	}
}

// parallelWithOwnClock does nothing: a test that moves the one clock runs alone.
func parallelWithOwnClock(*testing.T) {}

// setAPIServersClock moves the clock by which write leases end, until the test is over.
func setAPIServersClock(t *testing.T, _ string, now func() time.Time) {
	movedClock.Store(&now)
	t.Cleanup(func() { movedClock.Store(nil) })
}
