package conformance

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	kmsapi "k8s.io/kms/apis/v2"
)

func TestADecryptEndsAtItsDeadlineWhileTheModuleHangs(t *testing.T) {
	d := serving(t, func(s *settings) { s.callTimeout = "60s" })
	hurried := dial(t, d.pathEndpoint(), 500*time.Millisecond)
	seed, sealed := mustEncrypt(t, hurried)
	before := d.report(t).KMS.Counters

	d.freezeHosts(t)
	began := time.Now()
	if opened, err := hurried.Decrypt(t.Context(), newUID(), asked(sealed)); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("expected DeadlineExceeded, got %q, %v", opened, err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("a call with a deadline of 500 ms took %s", took)
	}
	// The API server hangs up at its deadline. That is how a module that hangs shows, so it has to be in the counters.
	eventually(t, 5*time.Second, "the Decrypt that nobody waits for is counted", func() error {
		if d.report(t).KMS.Counters.DecryptFailed == before.DecryptFailed {
			return errors.New("decrypt_failed has not risen")
		}
		return nil
	})

	d.thawHosts(t)
	patient := dial(t, d.pathEndpoint(), 10*time.Second)
	if opened, err := patient.Decrypt(t.Context(), newUID(), asked(sealed)); err != nil || !bytes.Equal(opened, seed) {
		t.Errorf("when the module goes on, Decrypt gives %q, %v", opened, err)
	}
}

func TestTheDaemonItselfEndsADecryptAtItsDeadline(t *testing.T) {
	d := serving(t, func(s *settings) { s.callTimeout = "60s" })
	_, sealed := mustEncrypt(t, dial(t, d.pathEndpoint(), 3*time.Second))
	before := d.report(t).KMS.Counters
	request := &kmsapi.DecryptRequest{Ciphertext: sealed.Ciphertext, KeyId: sealed.KeyID, Uid: newUID()}

	d.freezeHosts(t)
	defer d.thawHosts(t)
	began := time.Now()
	// This client names a deadline and does not watch it.
	code, _ := postGRPC(t, d.folder+"/kms/kms.sock", "/v2.KeyManagementService/Decrypt", "300m", request)
	if code != codes.DeadlineExceeded {
		t.Errorf("expected DeadlineExceeded, got %s", code)
	}
	if took := time.Since(began); took < 300*time.Millisecond || took > 2*time.Second {
		t.Errorf("a call with a deadline of 300 ms took %s", took)
	}
	if after := d.report(t).KMS.Counters; after.DecryptFailed-before.DecryptFailed != 1 {
		t.Errorf("expected it to be counted as one failed Decrypt, the daemon counted %+v, then %+v", before, after)
	}
	eventually(t, 5*time.Second, "the failure is in the log under the request's uid", func() error {
		return contains(d.log(t), request.Uid)
	})
}

func TestARequestWhoseDeadlineHasPassedOnArrivalIsRefused(t *testing.T) {
	d := serving(t)
	seed, sealed := mustEncrypt(t, dial(t, d.pathEndpoint(), 3*time.Second))
	before := d.report(t).KMS.Counters
	request := &kmsapi.DecryptRequest{Ciphertext: sealed.Ciphertext, KeyId: sealed.KeyID, Uid: newUID()}

	// grpc-go does not send such a request, so it is put on the wire by hand.
	for timeout, want := range map[string][]codes.Code{
		"1n":  {codes.DeadlineExceeded, codes.ResourceExhausted},
		"10S": {codes.OK},
	} {
		code, answer := postGRPC(t, d.folder+"/kms/kms.sock", "/v2.KeyManagementService/Decrypt", timeout, request)
		if code != want[0] && code != want[len(want)-1] {
			t.Errorf("with grpc-timeout %s expected %v, got %s", timeout, want, code)
		}
		if found := bytes.Contains(answer, seed); found != (code == codes.OK) {
			t.Errorf("with grpc-timeout %s the answer is %s, and the seed is in it: %v", timeout, code, found)
		}
	}
	if after := d.report(t).KMS.Counters; after.DecryptOK-before.DecryptOK != 1 {
		t.Errorf("expected one Decrypt answered, the daemon counted %+v, then %+v", before, after)
	}
}

// postGRPC makes a unary gRPC call with nothing between it and the bytes but HTTP/2.
func postGRPC(t *testing.T, socket, method, timeout string, message proto.Message) (codes.Code, []byte) {
	t.Helper()
	payload, err := proto.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	framed := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(payload)))
	framed = append(framed, payload...)

	transport := &http.Transport{
		Protocols: new(http.Protocols),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://localhost"+method, bytes.NewReader(framed))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("Te", "trailers")
	request.Header.Set("Grpc-Timeout", timeout)
	response, err := transport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	code := response.Trailer.Get("Grpc-Status")
	if code == "" {
		code = response.Header.Get("Grpc-Status")
	}
	number, err := strconv.Atoi(code)
	if err != nil {
		t.Fatalf("no grpc-status in the answer: %v %v", response.Header, response.Trailer)
	}
	return codes.Code(number), body
}

func TestAModuleHostThatHangsIsReplaced(t *testing.T) {
	t.Parallel()
	d := serving(t, func(s *settings) { s.callTimeout = "1s" })
	service := dial(t, d.pathEndpoint(), 10*time.Second)
	seed, sealed := mustEncrypt(t, service)
	before := d.report(t).Tokens[0]

	d.freezeHosts(t)
	began := time.Now()
	eventually(t, 20*time.Second, "a Decrypt is answered", func() error {
		opened, err := service.Decrypt(t.Context(), newUID(), asked(sealed))
		if err == nil && !bytes.Equal(opened, seed) {
			t.Fatalf("opened %q, sealed %q", opened, seed)
		}
		return err
	})
	t.Logf("answered %s after the module hung", time.Since(began).Round(time.Millisecond))
	after := d.report(t).Tokens[0]
	if after.Recovery.Stuck == before.Recovery.Stuck || after.Recovery.Respawned == before.Recovery.Respawned {
		t.Errorf("the daemon recovered, but counted neither a stuck call nor a new host: %+v", after.Recovery)
	}
	if before.HostPID == nil || after.HostPID == nil || *before.HostPID == *after.HostPID {
		t.Errorf("the host that hung still serves: pid %v, then %v", before.HostPID, after.HostPID)
	}
}
