//go:build !kube134

package conformance

import (
	"testing"
	"time"

	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
)

// parallelWithOwnClock lets a test that moves the API server's clock run beside others: each provider has its own.
func parallelWithOwnClock(t *testing.T) { t.Parallel() }

// setAPIServersClock moves the clock by which the provider's write lease ends, until the test is over.
func setAPIServersClock(t *testing.T, provider string, now func() time.Time) {
	t.Cleanup(kmsv2.SetNowFuncForTests(provider, now))
}
