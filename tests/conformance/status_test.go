package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsservice "k8s.io/kms/pkg/service"
)

func TestStatusNamesVersionHealthAndAKeyIDThatEncryptConfirms(t *testing.T) {
	d := serving(t)
	for _, endpoint := range []string{d.pathEndpoint(), d.abstractEndpoint()} {
		service := dial(t, endpoint, 3*time.Second)
		first, err := service.Status(t.Context())
		if err != nil {
			t.Fatalf("Status at %s: %v", endpoint, err)
		}
		if first.Version != "v2" || first.Healthz != "ok" {
			t.Errorf("expected version v2 and healthz ok, got %+v", first)
		}
		if !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(first.KeyID) {
			t.Errorf("expected a key_id of 32 hex digits, got %q", first.KeyID)
		}
		if told := d.report(t).KMS.KeyID; told == nil || *told != first.KeyID {
			t.Errorf("/status tells another key_id than Status: %v, %q", told, first.KeyID)
		}
		for range 20 {
			again, err := service.Status(t.Context())
			if err != nil || *again != *first {
				t.Fatalf("Status changed from %+v to %+v, %v", first, again, err)
			}
			if _, sealed := mustEncrypt(t, service); sealed.KeyID != first.KeyID {
				t.Fatalf("Encrypt names key_id %q, Status %q: the API server throws that answer away", sealed.KeyID, first.KeyID)
			}
		}
	}
}

func TestASealedSeedIsSmallAndHasNoAnnotations(t *testing.T) {
	d := serving(t)
	service := dial(t, d.pathEndpoint(), 3*time.Second)
	seed, sealed := mustEncrypt(t, service)
	// The API server copies both into every object.
	if size := len(sealed.Ciphertext); size > 120 {
		t.Errorf("a sealed seed of 32 bytes has %d bytes, over 120", size)
	}
	if len(sealed.Annotations) != 0 {
		t.Errorf("expected no annotations, got %v", sealed.Annotations)
	}
	if bytes.Contains(sealed.Ciphertext, seed) {
		t.Error("the seed is in the ciphertext in clear")
	}
	again, err := service.Encrypt(t.Context(), newUID(), seed)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(again.Ciphertext, sealed.Ciphertext) {
		t.Error("the same seed was sealed to the same bytes twice")
	}
}

func TestSeedsOfEveryLengthOpenAgain(t *testing.T) {
	d := serving(t)
	service := dial(t, d.pathEndpoint(), 3*time.Second)
	for _, length := range []int{1, 15, 16, 17, 31, 32, 33, 45, 64, 255, 512} {
		seed := bytes.Repeat([]byte{byte(length)}, length)
		sealed, err := service.Encrypt(t.Context(), newUID(), seed)
		if err != nil {
			t.Fatalf("Encrypt of %d bytes: %v", length, err)
		}
		opened, err := service.Decrypt(t.Context(), newUID(), asked(sealed))
		if err != nil || !bytes.Equal(opened, seed) {
			t.Fatalf("Decrypt of %d bytes: %q, %v", length, opened, err)
		}
	}
	for _, length := range []int{0, 513, 32 << 10} {
		if _, err := service.Encrypt(t.Context(), newUID(), make([]byte, length)); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%d bytes are no seed, yet Encrypt answers %v", length, err)
		}
	}
}

func TestAnUnconfiguredDaemonAnswersThatItIsAndServesOnceItIsConfigured(t *testing.T) {
	d := unconfigured(t)
	d.start(t)
	// One connection for both lives: the socket is there from the beginning and stays.
	service := dial(t, d.pathEndpoint(), 3*time.Second)
	_, statusErr := service.Status(t.Context())
	_, encryptErr := service.Encrypt(t.Context(), newUID(), []byte("seed"))
	_, decryptErr := service.Decrypt(t.Context(), newUID(), &kmsservice.DecryptRequest{Ciphertext: []byte("THSM"), KeyID: "id"})
	for call, err := range map[string]error{"Status": statusErr, "Encrypt": encryptErr, "Decrypt": decryptErr} {
		if status.Code(err) != codes.Unavailable {
			t.Errorf("%s of a daemon without a configuration: expected Unavailable, got %v", call, err)
		}
	}
	if r := d.report(t); r.Configuration.State != "unconfigured" || r.KMS.Ready || d.readyz() != 503 {
		t.Errorf("/status of a daemon without a configuration: %+v", r)
	}
	d.configure(t)
	d.waitReady(t)
	if answer, err := service.Status(t.Context()); err != nil || answer.Healthz != "ok" {
		t.Errorf("once configured, Status is %+v, %v", answer, err)
	}
}

func TestStatusAnswersAtOnceWhileTheModuleHangs(t *testing.T) {
	// A call timeout that the test does not reach: nothing but the hang itself is looked at.
	d := serving(t, func(s *settings) { s.callTimeout = "60s" })
	service := dial(t, d.pathEndpoint(), 3*time.Second)
	d.freezeHosts(t)
	defer d.thawHosts(t)
	for began := time.Now(); time.Since(began) < 2*time.Second; {
		asked := time.Now()
		if _, err := service.Status(t.Context()); err != nil {
			t.Fatalf("Status: %v", err)
		}
		if took := time.Since(asked); took > 500*time.Millisecond {
			t.Fatalf("Status took %s: it waited for the module", took)
		}
	}
	// A probe is due within 10 s, and 5 s in flight make it an alarm: still at once, now with the truth.
	eventually(t, 30*time.Second, "Status says that the module hangs", func() error {
		asked := time.Now()
		answer, err := service.Status(t.Context())
		if took := time.Since(asked); took > 500*time.Millisecond {
			t.Fatalf("Status took %s: it waited for the module", took)
		}
		if status.Code(err) != codes.Unavailable {
			return fmt.Errorf("it answers %+v, %w", answer, err)
		}
		return nil
	})
}

func TestAProcessThatIsNotTheAPIServerIsRefusedAndLearnsNothing(t *testing.T) {
	d := serving(t)
	for _, endpoint := range []string{d.pathEndpoint(), d.abstractEndpoint()} {
		var refusal string
		ask(t, "CallAsRoot", endpoint, &refusal)
		for _, secret := range []string{"uid", "cgroup", "pod", "65534"} {
			if strings.Contains(refusal, secret) {
				t.Errorf("the refusal at %s tells the stranger what was looked at: %s", endpoint, refusal)
			}
		}
	}
	eventually(t, 5*time.Second, "both refusals are counted", func() error {
		var sum uint64
		for _, count := range d.report(t).KMS.Counters.PeersRefused {
			sum += count
		}
		if sum < 2 {
			return errors.New("peers_refused sums up to less than 2")
		}
		return nil
	})
	if _, err := dial(t, d.abstractEndpoint(), 3*time.Second).Status(t.Context()); err != nil {
		t.Errorf("kube-apiserver is no longer served after a stranger was refused: %v", err)
	}
}
