package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"
)

const (
	// tokenUID is hsm-token's uid: the module works under it, so the token belongs to it.
	tokenUID = 64500
	// userPIN opens every token here. No answer and no log line may ever show it.
	userPIN = "4711-conformance"
	// softHSM is the module, where Debian puts it.
	softHSM = "/usr/lib/softhsm/libsofthsm2.so"
)

// Keeper is the root side of the tests, called over net/rpc: it owns tokens and daemons.
type Keeper struct {
	root string
	hsmd string
	// spawn runs on one thread that never ends: PDEATHSIG is tied to the thread that started the child.
	spawn chan func()

	mu      sync.Mutex
	count   int
	daemons map[string]*daemonProcess
}

type daemonProcess struct {
	command *exec.Cmd
	exited  chan struct{}
}

// Nothing is the argument or answer of a call that has none.
type Nothing struct{}

func newKeeper(root, hsmd string) *Keeper {
	k := &Keeper{root: root, hsmd: hsmd, spawn: make(chan func()), daemons: map[string]*daemonProcess{}}
	go func() {
		runtime.LockOSThread()
		for start := range k.spawn {
			start()
		}
	}()
	return k
}

func (k *Keeper) folder(kind string) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.count++
	folder := filepath.Join(k.root, fmt.Sprintf("%s-%d", kind, k.count))
	return folder, os.Mkdir(folder, 0o755)
}

// TokenSpec says what a token is to hold.
type TokenSpec struct {
	Label string
	// Keys are the labels of its AES-256 keys.
	Keys []string
}

// NewToken makes a SoftHSM token and answers its folder, which holds softhsm2.conf, pin and softhsm/tokens.
func (k *Keeper) NewToken(spec TokenSpec, folder *string) (err error) {
	if *folder, err = k.folder("token"); err != nil {
		return err
	}
	tokens := filepath.Join(*folder, "softhsm", "tokens")
	if err := os.MkdirAll(tokens, 0o755); err != nil {
		return err
	}
	conf := "directories.tokendir = " + tokens + "\nobjectstore.backend = file\nlog.level = ERROR\n"
	if err := os.WriteFile(filepath.Join(*folder, "softhsm2.conf"), []byte(conf), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(*folder, "pin"), []byte(userPIN+"\n"), 0o400); err != nil {
		return err
	}
	if err := k.tool(*folder, "softhsm2-util", "--init-token", "--free", "--label", spec.Label, "--so-pin", "so-"+userPIN, "--pin", userPIN); err != nil {
		return err
	}
	for number, key := range spec.Keys {
		err := k.tool(*folder, "pkcs11-tool", "--module", softHSM, "--token-label", spec.Label, "--login", "--pin", userPIN,
			"--keygen", "--key-type", "AES:32", "--label", key, "--id", fmt.Sprintf("%02x", number+1), "--sensitive")
		if err != nil {
			return err
		}
	}
	return filepath.WalkDir(filepath.Join(*folder, "softhsm"), func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, tokenUID, tokenUID))
	})
}

func (k *Keeper) tool(token, name string, args ...string) error {
	command := exec.Command(name, args...)
	command.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(token, "softhsm2.conf"))
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, out)
	}
	return nil
}

// TakeToken makes the token's files vanish, as when an HSM is unplugged under a running module.
func (k *Keeper) TakeToken(folder string, _ *Nothing) error {
	return os.Rename(filepath.Join(folder, "softhsm", "tokens"), filepath.Join(folder, "softhsm", "taken"))
}

// ReturnToken brings them back.
func (k *Keeper) ReturnToken(folder string, _ *Nothing) error {
	return os.Rename(filepath.Join(folder, "softhsm", "taken"), filepath.Join(folder, "softhsm", "tokens"))
}

// NewDaemon makes a folder for a daemon: hsmd.yaml, hsmd.log, state/ and kms/ will be in it.
func (k *Keeper) NewDaemon(_ Nothing, folder *string) (err error) {
	if *folder, err = k.folder("daemon"); err != nil {
		return err
	}
	return errors.Join(os.Mkdir(filepath.Join(*folder, "state"), 0o700), os.Mkdir(filepath.Join(*folder, "kms"), 0o755))
}

// ConfigText is a daemon's new configuration.
type ConfigText struct{ Folder, Text string }

// Configure writes the configuration as Talos does: the file is truncated and written in place.
func (k *Keeper) Configure(config ConfigText, _ *Nothing) error {
	return os.WriteFile(filepath.Join(config.Folder, "hsmd.yaml"), []byte(config.Text), 0o600)
}

// StartSpec says which daemon to start, and where it listens until its configuration says so.
type StartSpec struct {
	Folder string
	Listen []string
}

// Start starts hsmd in a folder and answers its pid.
func (k *Keeper) Start(spec StartSpec, pid *int) error {
	log, err := os.OpenFile(filepath.Join(spec.Folder, "hsmd.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"run", "--config", filepath.Join(spec.Folder, "hsmd.yaml"),
		"--health-listen", "unix://" + healthSocket(spec.Folder), "--log-format", "json"}
	for _, endpoint := range spec.Listen {
		args = append(args, "--listen", endpoint)
	}
	command := exec.Command(k.hsmd, args...)
	command.Stdout, command.Stderr = log, log
	command.Env = []string{"PATH=/usr/bin:/bin", "RUST_BACKTRACE=1"}
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	k.spawn <- func() { started <- command.Start() }
	if err := <-started; err != nil {
		return err
	}
	process := &daemonProcess{command: command, exited: make(chan struct{})}
	go func() {
		_ = command.Wait()
		close(process.exited)
	}()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.daemons[spec.Folder] = process
	*pid = command.Process.Pid
	return nil
}

// SignalSpec is a signal for a daemon or its module hosts.
type SignalSpec struct {
	Folder string
	Signal syscall.Signal
}

// Signal sends a signal to the daemon.
func (k *Keeper) Signal(spec SignalSpec, _ *Nothing) error {
	process, err := k.process(spec.Folder)
	if err != nil {
		return err
	}
	return process.command.Process.Signal(spec.Signal)
}

// SignalHosts sends a signal to every module host of the daemon and answers to how many processes. After SIGSTOP it
// returns when every thread stands still: until then each may still answer.
func (k *Keeper) SignalHosts(spec SignalSpec, count *int) error {
	process, err := k.process(spec.Folder)
	if err != nil {
		return err
	}
	hosts := descendants(process.command.Process.Pid)
	for _, pid := range hosts {
		if err := syscall.Kill(pid, spec.Signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	*count = len(hosts)
	for began := time.Now(); spec.Signal == syscall.SIGSTOP && !standStill(hosts); time.Sleep(time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			return fmt.Errorf("the module hosts %v still run 10 s after SIGSTOP", hosts)
		}
	}
	return nil
}

func standStill(pids []int) bool {
	for _, pid := range pids {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*/stat", pid))
		for _, path := range threads {
			if fields := statFields(path); len(fields) > 0 && fields[0] != "T" && fields[0] != "Z" {
				return false
			}
		}
	}
	return true
}

// Stop ends the daemon if it runs and answers how: empty for exit status 0.
func (k *Keeper) Stop(spec SignalSpec, how *string) error {
	process, err := k.process(spec.Folder)
	if err != nil {
		return err
	}
	_ = process.command.Process.Signal(spec.Signal)
	select {
	case <-process.exited:
	case <-time.After(10 * time.Second):
		_ = process.command.Process.Kill()
		<-process.exited
		return fmt.Errorf("hsmd still ran 10 s after %s", spec.Signal)
	}
	if state := process.command.ProcessState; !state.Success() {
		*how = state.String()
	}
	return nil
}

func (k *Keeper) stopAll() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, process := range k.daemons {
		_ = process.command.Process.Kill()
		<-process.exited
	}
}

func (k *Keeper) process(folder string) (*daemonProcess, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if process := k.daemons[folder]; process != nil {
		return process, nil
	}
	return nil, errors.New("no daemon was started in " + folder)
}

// GetSpec names a page of a daemon's health socket.
type GetSpec struct{ Folder, Path string }

// Page is what the health socket answered.
type Page struct {
	Status int
	Body   []byte
}

// Get reads a page of the health socket, which only root may.
func (k *Keeper) Get(spec GetSpec, page *Page) error {
	client := http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", healthSocket(spec.Folder))
			},
		},
	}
	response, err := client.Get("http://hsmd" + spec.Path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	page.Status = response.StatusCode
	page.Body, err = io.ReadAll(response.Body)
	return err
}

// Log answers what the daemon has logged so far.
func (k *Keeper) Log(folder string, text *string) error {
	log, err := os.ReadFile(filepath.Join(folder, "hsmd.log"))
	*text = string(log)
	return err
}

// CallAsRoot asks for Status as a process that is not kube-apiserver, and answers the error that it got.
func (k *Keeper) CallAsRoot(endpoint string, refusal *string) error {
	name := strings.TrimPrefix(strings.TrimPrefix(endpoint, "unix://"), "/@")
	if strings.HasPrefix(endpoint, "unix:///@") {
		name = "@" + name
	}
	connection, err := grpc.NewClient("passthrough:///localhost",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", name)
		}))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	answer, err := kmsapi.NewKeyManagementServiceClient(connection).Status(ctx, &kmsapi.StatusRequest{})
	if err == nil {
		return fmt.Errorf("a process that is not kube-apiserver was answered: %v", answer)
	}
	*refusal = err.Error()
	return nil
}

func healthSocket(folder string) string {
	return filepath.Join(folder, "state", "health.sock")
}

// descendants lists the processes below pid, by the parents that /proc names.
func descendants(pid int) []int {
	children := map[int][]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		fields := statFields(path)
		child, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || len(fields) < 2 {
			continue // it ended meanwhile
		}
		if parent, err := strconv.Atoi(fields[1]); err == nil {
			children[parent] = append(children[parent], child)
		}
	}
	var below []int
	for queue := children[pid]; len(queue) > 0; queue = queue[1:] {
		below = append(below, queue[0])
		queue = append(queue, children[queue[0]]...)
	}
	return below
}

// statFields answers what follows the program's name in a stat file of /proc: state, parent and so on. The name itself
// stands in parentheses and may hold anything.
func statFields(path string) []string {
	stat, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	return strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
}
