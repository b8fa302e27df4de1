// Command peer is the plain KMS v2 plugin that hsmd is compared with: what an author gets from a day with the two
// libraries that other Go plugins for PKCS#11 are made of, k8s.io/kms/pkg/service and crypto11.
//
// It is meant to be a fair peer: the key is found once, sessions are pooled and logged in once, an operation is one
// Init and one call, and nothing is logged per request. It has none of the rest: no peer check, no health of its own,
// no recovery, no rotation.
package main

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/ThalesGroup/crypto11"
	"k8s.io/kms/pkg/service"
)

const nonceSize = 12

func main() {
	socket := flag.String("socket", "", "path of the socket to serve on")
	module := flag.String("module", "", "path of the PKCS#11 module")
	tokenLabel := flag.String("token-label", "", "label of the token")
	pinFile := flag.String("pin-file", "", "file that holds the user PIN")
	keyLabel := flag.String("key-label", "", "label of the AES key")
	flag.Parse()
	if err := run(*socket, *module, *tokenLabel, *pinFile, *keyLabel); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(socket, module, tokenLabel, pinFile, keyLabel string) error {
	pin, err := os.ReadFile(pinFile)
	if err != nil {
		return err
	}
	token, err := crypto11.Configure(&crypto11.Config{
		Path:        module,
		TokenLabel:  tokenLabel,
		Pin:         strings.TrimRight(string(pin), "\r\n"),
		GCMIVLength: nonceSize,
	})
	if err != nil {
		return fmt.Errorf("open token %q: %w", tokenLabel, err)
	}
	defer token.Close()
	key, err := token.FindKey(nil, []byte(keyLabel))
	if err != nil {
		return fmt.Errorf("find key %q: %w", keyLabel, err)
	}
	if key == nil {
		return fmt.Errorf("token %q has no key %q", tokenLabel, keyLabel)
	}
	aead, err := key.NewGCM()
	if err != nil {
		return err
	}

	// The service only ever binds, and a killed predecessor leaves its file behind.
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	server := service.NewGRPCService(socket, time.Second, &plugin{aead: aead, keyID: keyLabel})
	stopped := make(chan os.Signal, 1)
	signal.Notify(stopped, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-stopped
		server.Shutdown()
	}()
	return server.ListenAndServe()
}

type plugin struct {
	aead  cipher.AEAD
	keyID string
}

var _ service.Service = (*plugin)(nil)

func (p *plugin) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: p.keyID}, nil
}

func (p *plugin) Encrypt(_ context.Context, _ string, plaintext []byte) (answer *service.EncryptResponse, err error) {
	// crypto11 reports what the token answers by a panic here, because cipher.AEAD has no error.
	defer func() {
		if failure := recover(); failure != nil {
			err = fmt.Errorf("encrypt: %v", failure)
		}
	}()
	nonce := make([]byte, nonceSize, nonceSize+len(plaintext)+p.aead.Overhead())
	rand.Read(nonce) // never fails
	sealed := p.aead.Seal(nonce, nonce, plaintext, []byte(p.keyID))
	return &service.EncryptResponse{Ciphertext: sealed, KeyID: p.keyID}, nil
}

func (p *plugin) Decrypt(_ context.Context, _ string, request *service.DecryptRequest) ([]byte, error) {
	if request.KeyID != p.keyID {
		return nil, fmt.Errorf("key_id %q is not ours", request.KeyID)
	}
	if len(request.Ciphertext) < nonceSize+p.aead.Overhead() {
		return nil, errors.New("ciphertext is cut short")
	}
	return p.aead.Open(nil, request.Ciphertext[:nonceSize], request.Ciphertext[nonceSize:], []byte(p.keyID))
}
