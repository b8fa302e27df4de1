package conformance

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsservice "k8s.io/kms/pkg/service"
)

// The envelope's fields, by their first byte. They are on disk for ever, so tests may know them.
const (
	versionAt     = 4
	mechanismAt   = 5
	fingerprintAt = 8
	clusterAt     = 16
	lengthAt      = 24
	nonceAt       = 28
	ciphertextAt  = 40
)

func TestCiphertextsThatCannotBeOpenedEachGiveTheirCode(t *testing.T) {
	d := serving(t)
	service := dial(t, d.pathEndpoint(), 3*time.Second)
	seed, sealed := mustEncrypt(t, service)
	good := sealed.Ciphertext
	last := len(good) - 1
	flipped := func(at int) []byte {
		bad := bytes.Clone(good)
		bad[at] ^= 1
		return bad
	}

	for _, damage := range []struct {
		name       string
		ciphertext []byte
		keyID      string
		want       codes.Code
	}{
		{"empty", nil, sealed.KeyID, codes.InvalidArgument},
		{"over-long", append(bytes.Clone(good), make([]byte, 1025-len(good))...), sealed.KeyID, codes.InvalidArgument},
		{"very long", bytes.Repeat([]byte("T"), 32<<10), sealed.KeyID, codes.InvalidArgument},
		{"one byte too many", append(bytes.Clone(good), 0), sealed.KeyID, codes.InvalidArgument},
		{"cut by one byte", good[:last], sealed.KeyID, codes.InvalidArgument},
		{"cut in the nonce", good[:nonceAt+4], sealed.KeyID, codes.InvalidArgument},
		{"cut after the header", good[:nonceAt], sealed.KeyID, codes.InvalidArgument},
		{"cut in the header", good[:fingerprintAt+1], sealed.KeyID, codes.InvalidArgument},
		{"one byte", good[:1], sealed.KeyID, codes.InvalidArgument},
		{"another plugin's", []byte("vault:v1:bm90IG91cnM="), sealed.KeyID, codes.InvalidArgument},
		{"a later format version", flipped(versionAt), sealed.KeyID, codes.InvalidArgument},
		{"an unknown mechanism", append(bytes.Clone(good[:mechanismAt]), append([]byte{0xff}, good[mechanismAt+1:]...)...), sealed.KeyID, codes.InvalidArgument},
		{"another plaintext length", flipped(lengthAt + 3), sealed.KeyID, codes.InvalidArgument},
		{"nonce tampered with", flipped(nonceAt), sealed.KeyID, codes.InvalidArgument},
		{"ciphertext tampered with", flipped(ciphertextAt), sealed.KeyID, codes.InvalidArgument},
		{"tag tampered with", flipped(last), sealed.KeyID, codes.InvalidArgument},
		{"another key_id", good, strings.Repeat("0", 32), codes.InvalidArgument},
		{"no key_id", good, "", codes.InvalidArgument},
		{"an over-long key_id", good, strings.Repeat("k", 1025), codes.InvalidArgument},
		{"an unknown key", flipped(fingerprintAt), sealed.KeyID, codes.NotFound},
		{"another cluster's", flipped(clusterAt), sealed.KeyID, codes.FailedPrecondition},
	} {
		t.Run(damage.name, func(t *testing.T) {
			uid := newUID()
			opened, err := service.Decrypt(t.Context(), uid, &kmsservice.DecryptRequest{Ciphertext: damage.ciphertext, KeyID: damage.keyID})
			if status.Code(err) != damage.want {
				t.Fatalf("expected %s, got %q, %v", damage.want, opened, err)
			}
			for _, secret := range []string{userPIN, string(seed), d.folder, d.settings.token} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the error tells the client %q: %v", secret, err)
				}
			}
			eventually(t, 5*time.Second, "the refusal is in the log under the request's uid", func() error {
				return contains(d.log(t), uid)
			})
		})
	}

	opened, err := service.Decrypt(t.Context(), newUID(), asked(sealed))
	if err != nil || !bytes.Equal(opened, seed) {
		t.Errorf("after all that the good ciphertext gives %q, %v", opened, err)
	}
	if r := d.report(t); !r.KMS.Ready || r.KMS.Counters.DecryptFailed == 0 || r.KMS.Counters.DecryptOK != 1 {
		t.Errorf("bad ciphertexts are the client's fault and are counted as such, but /status says %+v", r.KMS)
	}
	if text := d.log(t); strings.Contains(text, userPIN) || strings.Contains(text, string(seed)) {
		t.Error("the log holds the PIN or a seed")
	}
}

func TestAForeignClustersSeedOpensOnlyWhereItIsAccepted(t *testing.T) {
	token := newToken(t)
	daemonOf := func(cluster string, accept ...string) kmsservice.Service {
		d := serving(t, func(s *settings) { s.token, s.cluster, s.acceptClusters = token, cluster, accept })
		return dial(t, d.pathEndpoint(), 3*time.Second)
	}
	old, other, heir := daemonOf("old-name"), daemonOf("new-name"), daemonOf("new-name", "old-name")
	seed, sealed := mustEncrypt(t, old)

	if opened, err := other.Decrypt(t.Context(), newUID(), asked(sealed)); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("one key serves two clusters, and one opened the other's seed: %q, %v", opened, err)
	}
	opened, err := heir.Decrypt(t.Context(), newUID(), asked(sealed))
	if err != nil || !bytes.Equal(opened, seed) {
		t.Errorf("accept_clusters names the old cluster, yet Decrypt gives %q, %v", opened, err)
	}
	if _, resealed := mustEncrypt(t, heir); slices.Equal(resealed.Ciphertext[clusterAt:lengthAt], sealed.Ciphertext[clusterAt:lengthAt]) {
		t.Error("a new seed was sealed under the old cluster's name")
	}
}

func TestAnotherTokensSeedIsAnUnknownKey(t *testing.T) {
	here, elsewhere := serving(t), serving(t)
	_, sealed := mustEncrypt(t, dial(t, elsewhere.pathEndpoint(), 3*time.Second))
	// Same label, same cluster, another key: only the fingerprint tells.
	opened, err := dial(t, here.pathEndpoint(), 3*time.Second).Decrypt(t.Context(), newUID(), asked(sealed))
	if status.Code(err) != codes.NotFound {
		t.Errorf("expected NotFound, got %q, %v", opened, err)
	}
}
