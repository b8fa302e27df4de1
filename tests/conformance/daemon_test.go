package conformance

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	tokenLabel = "rciis-production"
	firstKey   = "k8s-secrets-kek"
	secondKey  = "k8s-secrets-kek-2"
	cluster    = "rciis-production"
)

// key is one line of kms.keys.
type key struct {
	label string
	epoch int
	state string
}

// settings is what tests vary in a daemon's configuration; zero values leave the daemon's defaults.
type settings struct {
	token          string
	cluster        string
	acceptClusters []string
	callTimeout    string
	whenLost       string
	keys           []key
}

// daemon is one hsmd with its folder, sockets and configuration.
type daemon struct {
	folder   string
	name     string // of its abstract socket, unique
	settings settings
}

// serving starts a daemon over a new token with one active key and waits until it is ready.
func serving(t *testing.T, change ...func(*settings)) *daemon {
	t.Helper()
	d := configured(t, change...)
	d.start(t)
	d.waitReady(t)
	return d
}

// configured makes token, folder and configuration, and starts nothing.
func configured(t *testing.T, change ...func(*settings)) *daemon {
	t.Helper()
	d := unconfigured(t, change...)
	d.configure(t)
	return d
}

// unconfigured makes token and folder; the configuration file is absent until configure is called.
func unconfigured(t *testing.T, change ...func(*settings)) *daemon {
	t.Helper()
	d := &daemon{name: "hsm-kms-" + randomHex(8)}
	d.settings = settings{cluster: cluster, keys: []key{{label: firstKey, epoch: 1, state: "active"}}}
	for _, apply := range change {
		apply(&d.settings)
	}
	if d.settings.token == "" {
		d.settings.token = newToken(t)
	}
	ask(t, "NewDaemon", Nothing{}, &d.folder)
	return d
}

func newToken(t *testing.T) (folder string) {
	t.Helper()
	ask(t, "NewToken", TokenSpec{Label: tokenLabel, Keys: []string{firstKey, secondKey}}, &folder)
	return folder
}

func (d *daemon) configure(t *testing.T) {
	t.Helper()
	ask(t, "Configure", ConfigText{Folder: d.folder, Text: d.config()}, &Nothing{})
}

// useKeys gives the daemon new kms.keys and waits until it has taken them.
func (d *daemon) useKeys(t *testing.T, keys ...key) {
	t.Helper()
	d.settings.keys = keys
	d.configure(t)
	eventually(t, 20*time.Second, fmt.Sprintf("hsmd works with %v", keys), func() error {
		report := d.report(t)
		found := 0
		for _, have := range report.Keys {
			for _, want := range keys {
				if have.Epoch != nil && (key{have.Label, *have.Epoch, have.State}) == want {
					found++
				}
			}
		}
		if found != len(keys) {
			return fmt.Errorf("it reports %+v, and what it did not take: %s", report.Keys, deref(report.Configuration.Rejected))
		}
		return nil
	})
}

func (d *daemon) start(t *testing.T) {
	t.Helper()
	var pid int
	ask(t, "Start", StartSpec{Folder: d.folder, Listen: []string{d.pathEndpoint(), d.abstractEndpoint()}}, &pid)
	t.Cleanup(func() {
		d.tellWhatWentWrong(t)
		// A daemon that a test stopped already is stopped once more, which does nothing.
		_ = keeper.Call("Keeper.Stop", SignalSpec{Folder: d.folder, Signal: syscall.SIGKILL}, new(string))
	})
}

func (d *daemon) pathEndpoint() string     { return "unix://" + d.folder + "/kms/kms.sock" }
func (d *daemon) abstractEndpoint() string { return "unix:///@" + d.name }

func (d *daemon) config() string {
	s := d.settings
	var text strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&text, format+"\n", args...) }
	line("cluster: %s", s.cluster)
	if len(s.acceptClusters) > 0 {
		line("accept_clusters: [%s]", strings.Join(s.acceptClusters, ", "))
	}
	line("tokens:")
	line("  - name: main")
	line("    uri: pkcs11:token=%s", tokenLabel)
	line("    module: %s", softHSM)
	line("    pin: {file: %s/pin}", s.token)
	if s.callTimeout != "" {
		line("    call_timeout: %s", s.callTimeout)
	}
	line("    host:")
	line("      uid: %d", tokenUID)
	line("      gid: %d", tokenUID)
	line("      env: {SOFTHSM2_CONF: %s/softhsm2.conf}", s.token)
	line("      read_only: [%s/softhsm2.conf]", s.token)
	// The folder above the token's: a bind mount of the token's own would hold on to it when it is taken away.
	line("      read_write: [%s/softhsm]", s.token)
	line("kms:")
	line("  listen:")
	line("    - {path: %s/kms/kms.sock, mode: \"0600\", owner: \"%d:%d\"}", d.folder, apiServerUID, apiServerUID)
	line("    - {abstract: %s}", d.name)
	if s.whenLost != "" {
		line("  when_hsm_is_lost: %s", s.whenLost)
	}
	line("  keys:")
	for _, key := range s.keys {
		line("    - uri: pkcs11:token=%s;object=%s;type=secret-key", tokenLabel, key.label)
		line("      epoch: %d", key.epoch)
		line("      state: %s", key.state)
		line("      backup: acknowledged")
	}
	line("  peers: {pod_logs: %s}", podLogs)
	line("state_dirs: [%s/state]", d.folder)
	return text.String()
}

func (d *daemon) takeToken(t *testing.T) {
	t.Helper()
	ask(t, "TakeToken", d.settings.token, &Nothing{})
}

func (d *daemon) returnToken(t *testing.T) {
	t.Helper()
	ask(t, "ReturnToken", d.settings.token, &Nothing{})
}

// freezeHosts stops every module host where it stands, as a vendor's library that hangs does.
func (d *daemon) freezeHosts(t *testing.T) {
	t.Helper()
	d.signalHosts(t, syscall.SIGSTOP)
}

func (d *daemon) thawHosts(t *testing.T) {
	t.Helper()
	d.signalHosts(t, syscall.SIGCONT)
}

func (d *daemon) signalHosts(t *testing.T, signal syscall.Signal) {
	t.Helper()
	var count int
	ask(t, "SignalHosts", SignalSpec{Folder: d.folder, Signal: signal}, &count)
	if count == 0 {
		t.Fatalf("hsmd has no module host to send %s to", signal)
	}
}

// stop ends the daemon and answers how it ended, empty for exit status 0.
func (d *daemon) stop(t *testing.T, signal syscall.Signal) (how string) {
	t.Helper()
	ask(t, "Stop", SignalSpec{Folder: d.folder, Signal: signal}, &how)
	return how
}

// report is the part of the health socket's /status that tests look at.
type report struct {
	KMS struct {
		Ready    bool    `json:"ready"`
		Reason   *string `json:"reason"`
		KeyID    *string `json:"key_id"`
		Counters struct {
			Status        uint64            `json:"status"`
			EncryptOK     uint64            `json:"encrypt_ok"`
			EncryptFailed uint64            `json:"encrypt_failed"`
			DecryptOK     uint64            `json:"decrypt_ok"`
			DecryptFailed uint64            `json:"decrypt_failed"`
			DecryptShared uint64            `json:"decrypt_shared"`
			PeersRefused  map[string]uint64 `json:"peers_refused"`
		} `json:"counters"`
	} `json:"kms"`
	Configuration struct {
		State    string  `json:"state"`
		Rejected *string `json:"rejected"`
	} `json:"configuration"`
	Keys []struct {
		Label string  `json:"label"`
		State string  `json:"state"`
		Epoch *int    `json:"epoch"`
		KeyID *string `json:"key_id"`
	} `json:"keys"`
	Tokens []struct {
		State    string  `json:"state"`
		Reason   *string `json:"reason"`
		HostPID  *int    `json:"host_pid"`
		Recovery struct {
			Stuck     uint64 `json:"stuck"`
			Respawned uint64 `json:"respawned"`
		} `json:"recovery"`
	} `json:"tokens"`
}

func (d *daemon) report(t *testing.T) (r report) {
	t.Helper()
	var page Page
	ask(t, "Get", GetSpec{Folder: d.folder, Path: "/status"}, &page)
	if err := json.Unmarshal(page.Body, &r); err != nil {
		t.Fatalf("/status is not JSON as agreed: %v\n%s", err, page.Body)
	}
	return r
}

// readyz answers the status code of /readyz, 0 when the daemon does not answer.
func (d *daemon) readyz() int {
	var page Page
	if keeper.Call("Keeper.Get", GetSpec{Folder: d.folder, Path: "/readyz"}, &page) != nil {
		return 0
	}
	return page.Status
}

func (d *daemon) waitReady(t *testing.T) {
	t.Helper()
	eventually(t, 30*time.Second, "hsmd is ready", func() error {
		if code := d.readyz(); code != 200 {
			return fmt.Errorf("/readyz answers %d", code)
		}
		return nil
	})
}

func (d *daemon) waitUnready(t *testing.T) {
	t.Helper()
	// A lost token has to show within 30 s; the rest is for a machine that is busy with other builds.
	eventually(t, 40*time.Second, "hsmd is not ready", func() error {
		if code := d.readyz(); code != 503 {
			return fmt.Errorf("/readyz answers %d", code)
		}
		return nil
	})
}

func (d *daemon) log(t *testing.T) (text string) {
	t.Helper()
	ask(t, "Log", d.folder, &text)
	return text
}

func (d *daemon) tellWhatWentWrong(t *testing.T) {
	if !t.Failed() {
		return
	}
	var page Page
	if err := keeper.Call("Keeper.Get", GetSpec{Folder: d.folder, Path: "/status"}, &page); err != nil {
		t.Logf("/status: %v", err)
	} else {
		t.Logf("/status: %s", page.Body)
	}
	var text string
	_ = keeper.Call("Keeper.Log", d.folder, &text)
	lines := strings.Split(strings.TrimSpace(text), "\n")
	t.Logf("hsmd's last words:\n%s", strings.Join(lines[max(0, len(lines)-40):], "\n"))
}

// ask calls the keeper; what it cannot do ends the test.
func ask(t *testing.T, method string, argument, answer any) {
	t.Helper()
	if err := keeper.Call("Keeper."+method, argument, answer); err != nil {
		t.Fatalf("%s: %v", method, err)
	}
}

func deref(text *string) string {
	if text == nil {
		return "nothing"
	}
	return *text
}

func contains(text, part string) error {
	if !strings.Contains(text, part) {
		return fmt.Errorf("it does not contain %q", part)
	}
	return nil
}

// eventually waits until check has no complaint any more, and fails with its last one.
func eventually(t *testing.T, within time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not so within %s: %s: %v", within, what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
