package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestASecretIsSealedAndAFreshAPIServerReadsIt(t *testing.T) {
	d := serving(t)
	provider := newProvider()
	server := startAPIServer(t, d.pathEndpoint(), provider)
	if err := server.check(); err != nil {
		t.Fatalf("kms-providers: %v", err)
	}
	stored := server.mustWrite(t, "a", "the clear text")
	if bytes.Contains(stored, []byte("the clear text")) {
		t.Error("the etcd value holds the secret in clear")
	}
	envelope := server.envelopeOf(t, stored)
	if len(envelope.EncryptedDEKSource) > 120 || len(envelope.Annotations) != 0 {
		t.Errorf("every object carries a seed of %d bytes and annotations %v", len(envelope.EncryptedDEKSource), envelope.Annotations)
	}

	before := d.report(t).KMS.Counters
	// The other socket leads to the same keys.
	fresh := startAPIServer(t, d.abstractEndpoint(), provider)
	if secret, stale := fresh.mustRead(t, "a", stored); secret != "the clear text" || stale {
		t.Errorf("a fresh API server reads %q, stale %v", secret, stale)
	}
	after := d.report(t).KMS.Counters
	if after.DecryptOK-before.DecryptOK != 1 || after.EncryptOK-before.EncryptOK != 1 {
		t.Errorf("a fresh API server needs one Encrypt to start and one Decrypt to read, the daemon counted %+v, then %+v", before, after)
	}
	// etcd's key is bound in by the API server: a value moved to another name must not open.
	if secret, _, err := fresh.read("b", stored); err == nil {
		t.Errorf("a value stored as a was read as b: %q", secret)
	}
}

func TestANewActiveKeyTakesOverWritesWhileOldSecretsStayReadable(t *testing.T) {
	t.Parallel()
	d := serving(t)
	provider := newProvider()
	server := startAPIServer(t, d.pathEndpoint(), provider)
	oldSecret := server.mustWrite(t, "old", "sealed under the first key")
	oldKeyID := server.envelopeOf(t, oldSecret).KeyID

	// First every node learns the key, then one of them uses it.
	d.useKeys(t, key{firstKey, 1, "active"}, key{secondKey, 2, "pending"})
	if answer, err := dial(t, d.pathEndpoint(), 3*time.Second).Status(t.Context()); err != nil || answer.KeyID != oldKeyID {
		t.Errorf("a pending key changed Status to %+v, %v", answer, err)
	}
	d.useKeys(t, key{firstKey, 1, "retired"}, key{secondKey, 2, "active"})

	// The API server keeps a good answer for 20 s, so this is when it asks again.
	var newSecret []byte
	eventually(t, 40*time.Second, "the API server seals under the new key", func() error {
		if err := server.check(); err != nil {
			return err
		}
		newSecret = server.mustWrite(t, "new", "sealed under the second key")
		if server.envelopeOf(t, newSecret).KeyID == oldKeyID {
			return errors.New("it still uses the old one")
		}
		return nil
	})
	if secret, stale := server.mustRead(t, "old", oldSecret); secret != "sealed under the first key" || !stale {
		t.Errorf("the old secret reads %q, stale %v; it should read as before and be stale, so that a migration rewrites it", secret, stale)
	}
	fresh := startAPIServer(t, d.pathEndpoint(), provider)
	for name, stored := range map[string][]byte{"old": oldSecret, "new": newSecret} {
		if _, stale := fresh.mustRead(t, name, stored); stale != (name == "old") {
			t.Errorf("a fresh API server finds %s stale: %v", name, stale)
		}
	}
}

func TestGoingBackToAnOldKeyIsANewKeyID(t *testing.T) {
	t.Parallel()
	d := serving(t)
	service := dial(t, d.pathEndpoint(), 3*time.Second)
	seen := map[string]string{}
	for _, step := range [][]key{
		{{firstKey, 1, "active"}, {secondKey, 2, "pending"}},
		{{firstKey, 1, "retired"}, {secondKey, 2, "active"}},
		{{firstKey, 3, "active"}, {secondKey, 2, "retired"}},
	} {
		d.useKeys(t, step...)
		answer, err := service.Status(t.Context())
		if err != nil {
			t.Fatalf("Status with %v: %v", step, err)
		}
		if before, used := seen[answer.KeyID]; used {
			t.Errorf("%v has the key_id %s, which was that of %s", step, answer.KeyID, before)
		}
		seen[answer.KeyID] = fmt.Sprint(step)
	}
}

func TestAKeyThatNoNodeKnowsYetIsNotActivated(t *testing.T) {
	t.Parallel()
	d := serving(t)
	service := dial(t, d.pathEndpoint(), 3*time.Second)
	before, err := service.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d.settings.keys = []key{{firstKey, 1, "retired"}, {secondKey, 2, "active"}}
	d.configure(t)
	eventually(t, 20*time.Second, "hsmd says that it does not take the configuration", func() error {
		return contains(deref(d.report(t).Configuration.Rejected), secondKey)
	})
	if after, err := service.Status(t.Context()); err != nil || *after != *before {
		t.Errorf("Status changed from %+v to %+v, %v", before, after, err)
	}
}

func TestAnAPIServerThatStartsBeforeTheDaemonComesToLife(t *testing.T) {
	t.Parallel()
	d := configured(t)
	server := startAPIServer(t, d.pathEndpoint(), newProvider())
	if server.check() == nil {
		t.Fatal("kms-providers is fine without a daemon")
	}
	if _, err := server.write("early", "secret"); err == nil {
		t.Fatal("a secret was written without a daemon")
	}
	d.start(t)
	eventually(t, 60*time.Second, "kms-providers is ok", server.check)
	stored := server.mustWrite(t, "late", "secret")
	if secret, _ := server.mustRead(t, "late", stored); secret != "secret" {
		t.Errorf("read %q", secret)
	}
}

func TestHealthFollowsTheToken(t *testing.T) {
	t.Parallel()
	d := serving(t)
	provider := newProvider()
	server := startAPIServer(t, d.pathEndpoint(), provider)
	stored := server.mustWrite(t, "a", "secret")
	if err := server.check(); err != nil {
		t.Fatalf("kms-providers: %v", err)
	}

	d.takeToken(t)
	d.waitUnready(t)
	if reason := d.report(t).KMS.Reason; reason == nil || *reason == "" {
		t.Error("/status does not say why the face is not ready")
	}
	eventually(t, 40*time.Second, "kms-providers is red", func() error { return mustComplain(server.check()) })
	if _, _, err := startAPIServer(t, d.pathEndpoint(), provider).read("a", stored); err == nil {
		t.Error("a fresh API server read a secret while the token was away")
	}

	d.returnToken(t)
	eventually(t, 15*time.Second, "hsmd is ready again", func() error {
		if code := d.readyz(); code != 200 {
			return fmt.Errorf("/readyz answers %d", code)
		}
		return nil
	})
	eventually(t, 15*time.Second, "kms-providers is green again", server.check)
	if secret, _ := startAPIServer(t, d.pathEndpoint(), provider).mustRead(t, "a", stored); secret != "secret" {
		t.Errorf("read %q", secret)
	}
}

func TestWritesStopWhenTheirLeaseEndsWithoutTheHSM(t *testing.T) {
	parallelWithOwnClock(t)
	d := serving(t)
	provider := newProvider()
	server := startAPIServer(t, d.pathEndpoint(), provider)
	stored := server.mustWrite(t, "a", "secret")

	d.takeToken(t)
	d.waitUnready(t)
	eventually(t, 40*time.Second, "kms-providers is red", func() error { return mustComplain(server.check()) })
	server.mustWrite(t, "b", "within the lease of three minutes")

	setAPIServersClock(t, provider, func() time.Time { return time.Now().Add(4 * time.Minute) })
	if _, err := server.write("c", "secret"); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("a write four minutes after the loss should fail for its expired lease, got %v", err)
	}
	if err := server.check(); err == nil {
		t.Error("kms-providers is green while the token is away")
	}
	if _, err := server.write("c", "secret"); err == nil {
		t.Error("an unhealthy Status extended the lease")
	}
	if secret, _ := server.mustRead(t, "a", stored); secret != "secret" {
		t.Errorf("reads have no lease, yet it reads %q", secret)
	}

	d.returnToken(t)
	eventually(t, 30*time.Second, "kms-providers is green again", server.check)
	server.mustWrite(t, "c", "secret")
}

func TestACoastingDaemonKeepsWritesGoingAndTellsOfTheLoss(t *testing.T) {
	parallelWithOwnClock(t)
	d := serving(t, func(s *settings) { s.whenLost = "coast" })
	provider := newProvider()
	server := startAPIServer(t, d.pathEndpoint(), provider)
	server.mustWrite(t, "a", "secret")

	d.takeToken(t)
	d.waitUnready(t)
	setAPIServersClock(t, provider, func() time.Time { return time.Now().Add(4 * time.Minute) })
	// Unhealthy, with the key_id: that answer extends the lease.
	eventually(t, 40*time.Second, "kms-providers is red and writes go on", func() error {
		if err := mustComplain(server.check()); err != nil {
			return err
		}
		_, err := server.write("b", "secret")
		return err
	})
}

func mustComplain(err error) error {
	if err == nil {
		return errors.New("there is no complaint yet")
	}
	return nil
}
