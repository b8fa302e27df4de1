package conformance

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"
	kmsservice "k8s.io/kms/pkg/service"
)

func TestFiftyCallersAtOnceAreAllServed(t *testing.T) {
	const callers, rounds = 50, 10
	d := serving(t)
	before := d.report(t).KMS.Counters
	shared := dial(t, d.pathEndpoint(), 10*time.Second)
	var group sync.WaitGroup
	failures := make(chan error, callers)
	for caller := range callers {
		// Half of them over one connection, as one API server does, half over their own.
		service := shared
		if caller%2 == 1 {
			service = dial(t, d.abstractEndpoint(), 10*time.Second)
		}
		group.Go(func() {
			for round := range rounds {
				if err := roundTrip(t.Context(), service); err != nil {
					failures <- fmt.Errorf("caller %d, round %d: %w", caller, round, err)
					return
				}
			}
		})
	}
	group.Wait()
	close(failures)
	for err := range failures {
		t.Error(err)
	}
	after := d.report(t).KMS.Counters
	if after.EncryptOK-before.EncryptOK != callers*rounds || after.DecryptOK-before.DecryptOK != callers*rounds {
		t.Errorf("%d Encrypts and as many Decrypts were answered, the daemon counted %+v, then %+v", callers*rounds, before, after)
	}
	if after.DecryptShared != before.DecryptShared {
		t.Error("different Decrypts shared an HSM operation")
	}
}

func roundTrip(ctx context.Context, service kmsservice.Service) error {
	seed := []byte(randomHex(16))
	sealed, err := service.Encrypt(ctx, newUID(), seed)
	if err != nil {
		return fmt.Errorf("Encrypt: %w", err)
	}
	opened, err := service.Decrypt(ctx, newUID(), asked(sealed))
	if err != nil {
		return fmt.Errorf("Decrypt: %w", err)
	}
	if !bytes.Equal(opened, seed) {
		return fmt.Errorf("opened %q, sealed %q", opened, seed)
	}
	return nil
}

func TestTenIdenticalDecryptsAtOnceAreOneHSMOperation(t *testing.T) {
	d := serving(t, func(s *settings) { s.callTimeout = "60s" })
	client := newCountingClient(t, d)
	seed, sealed := mustEncrypt(t, dial(t, d.pathEndpoint(), 3*time.Second))
	before := d.report(t).KMS.Counters

	d.freezeHosts(t)
	answers := client.decryptTimes(t, 10, 20*time.Second, sealed)
	d.thawHosts(t)
	for range 10 {
		answer := <-answers
		if answer.err != nil || !bytes.Equal(answer.plaintext, seed) {
			t.Errorf("one of the ten got %q, %v", answer.plaintext, answer.err)
		}
	}
	after := d.report(t).KMS.Counters
	if answered, shared := after.DecryptOK-before.DecryptOK, after.DecryptShared-before.DecryptShared; answered != 10 || shared != 9 {
		t.Errorf("expected 10 answers of which 9 shared another's HSM operation, the daemon counted %d and %d", answered, shared)
	}

	// Nothing is kept: the same Decrypt later is an operation of its own.
	if answer := <-client.decryptTimes(t, 1, 20*time.Second, sealed); answer.err != nil {
		t.Error(answer.err)
	}
	if again := d.report(t).KMS.Counters; again.DecryptShared != after.DecryptShared {
		t.Error("a Decrypt after the others was answered from a memory")
	}
}

func TestACallerThatGivesUpDoesNotFailThoseWhoWaitWithIt(t *testing.T) {
	d := serving(t, func(s *settings) { s.callTimeout = "60s" })
	client := newCountingClient(t, d)
	seed, sealed := mustEncrypt(t, dial(t, d.pathEndpoint(), 3*time.Second))

	d.freezeHosts(t)
	// The first to come starts the operation, and is the first to go.
	impatient := client.decryptTimes(t, 1, 300*time.Millisecond, sealed)
	patient := client.decryptTimes(t, 9, 20*time.Second, sealed)
	if answer := <-impatient; status.Code(answer.err) != codes.DeadlineExceeded {
		t.Errorf("the impatient one got %q, %v", answer.plaintext, answer.err)
	}
	d.thawHosts(t)
	for range 9 {
		if answer := <-patient; answer.err != nil || !bytes.Equal(answer.plaintext, seed) {
			t.Errorf("one of those who waited got %q, %v", answer.plaintext, answer.err)
		}
	}
}

// countingClient knows when its requests have reached the daemon.
type countingClient struct {
	kmsapi.KeyManagementServiceClient
	sent *sentCounter
}

type decryptAnswer struct {
	plaintext []byte
	err       error
}

func newCountingClient(t *testing.T, d *daemon) *countingClient {
	t.Helper()
	sent := new(sentCounter)
	client := dialPlainly(t, "localhost", d.folder+"/kms/kms.sock", grpc.WithStatsHandler(sent))
	return &countingClient{KeyManagementServiceClient: client, sent: sent}
}

// decryptTimes sends the same Decrypt so many times at once and returns when all of them are in the daemon's hands.
func (c *countingClient) decryptTimes(t *testing.T, count int, timeout time.Duration, sealed *kmsservice.EncryptResponse) <-chan decryptAnswer {
	t.Helper()
	before := c.sent.payloads.Load()
	answers := make(chan decryptAnswer, count)
	for range count {
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), timeout)
			defer cancel()
			answer, err := c.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: sealed.Ciphertext, KeyId: sealed.KeyID, Uid: newUID()})
			answers <- decryptAnswer{answer.GetPlaintext(), err}
		}()
	}
	eventually(t, 10*time.Second, "all Decrypts are on their way", func() error {
		if sent := c.sent.payloads.Load() - before; sent < int64(count) {
			return fmt.Errorf("%d of %d are", sent, count)
		}
		return nil
	})
	// They share one connection, and this comes behind them on it: when it is answered, they have been read.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := c.Status(ctx, &kmsapi.StatusRequest{}); err != nil {
		t.Fatalf("Status behind the Decrypts: %v", err)
	}
	return answers
}

// sentCounter counts the requests that were handed to the connection.
type sentCounter struct{ payloads atomic.Int64 }

func (c *sentCounter) HandleRPC(_ context.Context, event stats.RPCStats) {
	if _, sent := event.(*stats.OutPayload); sent {
		c.payloads.Add(1)
	}
}
func (*sentCounter) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (*sentCounter) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (*sentCounter) HandleConn(context.Context, stats.ConnStats)                       {}
