package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

func TestThePeerSealsAndOpensUnderTheTokensKeyForManyCallersAtOnce(t *testing.T) {
	folder := t.TempDir()
	conf := filepath.Join(folder, "softhsm2.conf")
	pin := filepath.Join(folder, "pin")
	write(t, conf, "directories.tokendir = "+folder+"\n")
	write(t, pin, "1234\n")
	t.Setenv("SOFTHSM2_CONF", conf)
	tool(t, "softhsm2-util", "--init-token", "--free", "--label", "peer", "--so-pin", "12345678", "--pin", "1234")
	tool(t, "pkcs11-tool", "--module", softHSM, "--token-label", "peer", "--login", "--pin", "1234",
		"--keygen", "--key-type", "AES:32", "--label", "kek", "--id", "01", "--sensitive")

	socket := filepath.Join(folder, "kms.sock")
	write(t, socket, "what a killed predecessor leaves behind")
	go func() {
		if err := run(socket, softHSM, "peer", pin, "kek"); err != nil {
			t.Error(err)
		}
	}()

	connection, err := grpc.NewClient("passthrough:///localhost", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	client := kmsapi.NewKeyManagementServiceClient(connection)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	var group sync.WaitGroup
	for caller := range 16 {
		group.Go(func() {
			seed := bytes.Repeat([]byte{byte(caller)}, 32)
			for range 20 {
				sealed, err := client.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: seed})
				if err != nil {
					t.Errorf("Encrypt: %v", err)
					return
				}
				opened, err := client.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: sealed.Ciphertext, KeyId: sealed.KeyId})
				if err != nil || !bytes.Equal(opened.Plaintext, seed) {
					t.Errorf("Decrypt: %v, %v", opened, err)
					return
				}
			}
		})
	}
	group.Wait()

	sealed, err := client.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: []byte("seed")})
	if err != nil {
		t.Fatal(err)
	}
	sealed.Ciphertext[len(sealed.Ciphertext)-1] ^= 1
	if opened, err := client.Decrypt(ctx, &kmsapi.DecryptRequest{Ciphertext: sealed.Ciphertext, KeyId: sealed.KeyId}); err == nil {
		t.Errorf("a tampered ciphertext opened to %v", opened)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}
