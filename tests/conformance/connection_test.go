package conformance

import (
	"bytes"
	"fmt"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	kmsapi "k8s.io/kms/apis/v2"
)

func TestAPIServersBefore132AreServedOnTheAbstractSocket(t *testing.T) {
	d := serving(t)
	// Without WithAuthority grpc-go sends the target as :authority, and theirs is the name of the socket.
	old := dialPlainly(t, "@"+d.name, "@"+d.name)
	ctx := t.Context()
	answer, err := old.Status(ctx, &kmsapi.StatusRequest{}, grpc.WaitForReady(false))
	if err != nil || answer.Healthz != "ok" {
		t.Fatalf("Status: %v, %v", answer, err)
	}
	seed := []byte(randomHex(16))
	sealed, err := old.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: seed, Uid: newUID()})
	if err != nil {
		t.Fatal(err)
	}
	opened, err := old.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: sealed.Ciphertext, KeyId: sealed.KeyId, Uid: newUID()})
	if err != nil || !bytes.Equal(opened.Plaintext, seed) {
		t.Errorf("Decrypt: %v, %v", opened, err)
	}
}

func TestAnOpenConnectionOutlivesTheDaemonsDeath(t *testing.T) {
	t.Parallel()
	d := serving(t)
	service := dial(t, d.pathEndpoint(), 3*time.Second)
	seed, sealed := mustEncrypt(t, service)

	for round := range 2 {
		// The socket's file stays behind, and so may a half of a module host.
		if how := d.stop(t, syscall.SIGKILL); how == "" {
			t.Fatal("a daemon that was killed ended with status 0")
		}
		d.start(t)
		began := time.Now()
		eventually(t, 15*time.Second, "the same client is served by the new daemon", func() error {
			opened, err := service.Decrypt(t.Context(), newUID(), asked(sealed))
			if err == nil && !bytes.Equal(opened, seed) {
				err = fmt.Errorf("opened %q, sealed %q", opened, seed)
			}
			return err
		})
		t.Logf("round %d: served again after %s", round, time.Since(began).Round(time.Millisecond))
	}
}

func TestADaemonToldToEndAnswersWhatItHasAccepted(t *testing.T) {
	d := serving(t, func(s *settings) { s.callTimeout = "60s" })
	client := newCountingClient(t, d)
	seed, sealed := mustEncrypt(t, dial(t, d.pathEndpoint(), 3*time.Second))

	d.freezeHosts(t)
	answers := client.decryptTimes(t, 3, 20*time.Second, sealed)
	// Signal, not stop: while it waits for the module's answers, that has to go on.
	ask(t, "Signal", SignalSpec{Folder: d.folder, Signal: syscall.SIGTERM}, &Nothing{})
	began := time.Now()
	d.thawHosts(t)
	for range 3 {
		if answer := <-answers; answer.err != nil || !bytes.Equal(answer.plaintext, seed) {
			t.Errorf("a Decrypt accepted before SIGTERM got %q, %v", answer.plaintext, answer.err)
		}
	}
	if how := d.stop(t, syscall.SIGTERM); how != "" {
		t.Errorf("hsmd ended with %s", how)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("hsmd ended %s after SIGTERM, over 5 s", took)
	}
}

func TestADaemonWhoseModuleHangsStillEndsWithinFiveSeconds(t *testing.T) {
	t.Parallel()
	d := serving(t, func(s *settings) { s.callTimeout = "60s" })
	client := newCountingClient(t, d)
	_, sealed := mustEncrypt(t, dial(t, d.pathEndpoint(), 3*time.Second))

	d.freezeHosts(t)
	answers := client.decryptTimes(t, 1, 20*time.Second, sealed)
	began := time.Now()
	if how := d.stop(t, syscall.SIGTERM); how != "" {
		t.Errorf("hsmd ended with %s", how)
	}
	if took := time.Since(began); took > 6*time.Second {
		t.Errorf("hsmd ended %s after SIGTERM, over 5 s", took)
	}
	if answer := <-answers; answer.err == nil {
		t.Error("a Decrypt was answered by a module that hangs")
	}
}
