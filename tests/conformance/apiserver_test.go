package conformance

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/apiserver/pkg/server/healthz"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	kmstypes "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
	kmsapi "k8s.io/kms/apis/v2"
	kmsservice "k8s.io/kms/pkg/service"
)

// apiServer is what a kube-apiserver process makes of an EncryptionConfiguration: loading it is starting the process.
type apiServer struct {
	provider  string
	secrets   value.Transformer
	kmsHealth healthz.HealthChecker
}

// startAPIServer loads an EncryptionConfiguration that names one KMS v2 provider. A second one with the same provider
// is a restarted server: it has the same data before it and an empty memory.
func startAPIServer(t *testing.T, endpoint, provider string) *apiServer {
	t.Helper()
	file := filepath.Join(t.TempDir(), "encryption.yaml")
	config := fmt.Sprintf(`apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
  - resources: [secrets]
    providers:
      - kms: {apiVersion: v2, name: %s, endpoint: "%s", timeout: 3s}
`, provider, endpoint)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(stop)
	loaded, err := encryptionconfig.LoadEncryptionConfig(ctx, file, false, "apiserver-"+randomHex(4))
	if err != nil {
		t.Fatalf("kube-apiserver does not take its EncryptionConfiguration: %v", err)
	}
	if len(loaded.HealthChecks) != 1 || loaded.HealthChecks[0].Name() != "kms-providers" {
		t.Fatalf("expected the one health check kms-providers, got %v", loaded.HealthChecks)
	}
	return &apiServer{
		provider:  provider,
		secrets:   loaded.Transformers[schema.GroupResource{Resource: "secrets"}],
		kmsHealth: loaded.HealthChecks[0],
	}
}

// newProvider is a provider's name that no other test uses: the client keeps metrics and clocks by it.
func newProvider() string { return "hsm-" + randomHex(4) }

// check is what /readyz/kms-providers does.
func (a *apiServer) check() error {
	request, err := http.NewRequest(http.MethodGet, "/readyz/kms-providers", nil)
	if err != nil {
		return err
	}
	return a.kmsHealth.Check(request)
}

// write answers what the server would put into etcd under the name.
func (a *apiServer) write(name, secret string) ([]byte, error) {
	return a.secrets.TransformToStorage(context.Background(), []byte(secret), etcdKey(name))
}

func (a *apiServer) mustWrite(t *testing.T, name, secret string) []byte {
	t.Helper()
	stored, err := a.write(name, secret)
	if err != nil {
		t.Fatalf("write of %s: %v", name, err)
	}
	return stored
}

// read answers what the server makes of an etcd value.
func (a *apiServer) read(name string, stored []byte) (secret string, stale bool, err error) {
	clear, stale, err := a.secrets.TransformFromStorage(context.Background(), stored, etcdKey(name))
	return string(clear), stale, err
}

func (a *apiServer) mustRead(t *testing.T, name string, stored []byte) (secret string, stale bool) {
	t.Helper()
	secret, stale, err := a.read(name, stored)
	if err != nil {
		t.Fatalf("read of %s: %v", name, err)
	}
	return secret, stale
}

// envelopeOf takes an etcd value apart as far as it is in clear.
func (a *apiServer) envelopeOf(t *testing.T, stored []byte) *kmstypes.EncryptedObject {
	t.Helper()
	rest, found := bytes.CutPrefix(stored, []byte("k8s:enc:kms:v2:"+a.provider+":"))
	if !found {
		t.Fatalf("the etcd value does not begin with the KMS v2 prefix: %q", stored)
	}
	object := new(kmstypes.EncryptedObject)
	if err := proto.Unmarshal(rest, object); err != nil {
		t.Fatal(err)
	}
	return object
}

func etcdKey(name string) value.Context {
	return value.DefaultContext("/registry/secrets/default/" + name)
}

// dial opens kube-apiserver's own gRPC service to an endpoint.
func dial(t *testing.T, endpoint string, timeout time.Duration) kmsservice.Service {
	t.Helper()
	ctx, hangUp := context.WithCancel(context.Background())
	t.Cleanup(hangUp)
	service, err := kmsv2.NewGRPCService(ctx, endpoint, newProvider(), timeout)
	if err != nil {
		t.Fatal(err)
	}
	return service
}

// dialPlainly opens the generated client, where a test needs to see or set more than the API server's service shows.
// Its authority is kube-apiserver's since 1.32; an option can take that away again.
func dialPlainly(t *testing.T, target, socket string, options ...grpc.DialOption) kmsapi.KeyManagementServiceClient {
	t.Helper()
	options = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}),
	}, options...)
	connection, err := grpc.NewClient("passthrough:///"+target, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() })
	return kmsapi.NewKeyManagementServiceClient(connection)
}

func newUID() string { return string(uuid.NewUUID()) }

// mustEncrypt seals a fresh seed of the size that kube-apiserver uses.
func mustEncrypt(t *testing.T, service kmsservice.Service) (seed []byte, sealed *kmsservice.EncryptResponse) {
	t.Helper()
	seed = []byte(randomHex(16))
	sealed, err := service.Encrypt(t.Context(), newUID(), seed)
	if err != nil {
		t.Fatalf("Encrypt: %v", err)
	}
	return seed, sealed
}

func asked(sealed *kmsservice.EncryptResponse) *kmsservice.DecryptRequest {
	return &kmsservice.DecryptRequest{Ciphertext: sealed.Ciphertext, KeyID: sealed.KeyID, Annotations: sealed.Annotations}
}
