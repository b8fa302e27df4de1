package conformance

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"k8s.io/klog/v2"
)

const (
	// apiServerUID is kube-apiserver's uid and gid on Talos.
	apiServerUID = 65534
	// roleVariable tells a re-executed test binary that it is the API server, and where its world is.
	roleVariable = "CONFORMANCE_POD_LOGS"
	// keeperFD is where the API server's side finds its line to the keeper.
	keeperFD = 3
)

var (
	// keeper is the root process, seen from the tests.
	keeper *rpc.Client
	// podLogs is the folder that stands in for /var/log/pods.
	podLogs string
)

func TestMain(m *testing.M) {
	podLogs = os.Getenv(roleVariable)
	if podLogs == "" {
		status, err := keep()
		if err != nil {
			fmt.Fprintln(os.Stderr, "error:", err)
			status = 1
		}
		os.Exit(status)
	}

	silenceClient()

	line, err := net.FileConn(os.NewFile(keeperFD, "keeper"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "error: no line to the keeper:", err)
		os.Exit(1)
	}
	keeper = rpc.NewClient(line)
	os.Exit(m.Run())
}

// silenceClient drops the client's log: tests provoke on purpose what it complains about.
func silenceClient() {
	var flags flag.FlagSet
	klog.InitFlags(&flags)
	for name, value := range map[string]string{"logtostderr": "false", "stderrthreshold": "FATAL"} {
		if err := flags.Set(name, value); err != nil {
			panic(err) // klog has no such flag
		}
	}
	klog.SetOutput(io.Discard)
}

// keep is the root side: it starts the tests as the API server's process, serves them, and leaves nothing behind.
func keep() (status int, err error) {
	// PDEATHSIG fires when the thread that started the child ends, and this one lives until the end.
	runtime.LockOSThread()

	hsmd, err := findTools()
	if err != nil {
		return 0, err
	}
	root, err := os.MkdirTemp("", "hsm-conformance-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(root)
	// Daemon, module host and API server are three users here, and each has to get to its own files.
	if err := os.Chmod(root, 0o755); err != nil {
		return 0, err
	}

	pod, err := makeStaticPod(filepath.Join(root, "pods"))
	if err != nil {
		return 0, err
	}
	defer pod.remove()

	served := newKeeper(root, hsmd)
	defer served.stopAll()

	mine, theirs, err := socketPair()
	if err != nil {
		return 0, err
	}
	defer mine.Close()
	server := rpc.NewServer()
	if err := server.Register(served); err != nil {
		return 0, err
	}
	go server.ServeConn(mine)

	// Most tests wait for probes and leases, not for a processor; a -parallel of the caller comes later and wins.
	args := append([]string{"-test.parallel=8"}, withoutRootsFiles(os.Args[1:])...)
	tests := exec.Command("/proc/self/exe", args...)
	tests.Env = append(os.Environ(), roleVariable+"="+pod.logs, "HOME="+root, "TMPDIR=")
	tests.Stdout, tests.Stderr = os.Stdout, os.Stderr
	tests.ExtraFiles = []*os.File{theirs}
	tests.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: apiServerUID, Gid: apiServerUID},
		UseCgroupFD: true,
		CgroupFD:    int(pod.cgroup.Fd()),
		Pdeathsig:   syscall.SIGKILL,
	}
	// We outlive the tests, to clean up behind them.
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	if err := tests.Start(); err != nil {
		return 0, fmt.Errorf("start the tests as uid %d: %w", apiServerUID, err)
	}
	theirs.Close()
	go func() {
		<-ended
		_ = tests.Process.Kill()
	}()
	err = tests.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	}
	return 0, err
}

func findTools() (hsmd string, err error) {
	if os.Geteuid() != 0 {
		return "", errors.New("the conformance tests must run as root: they make a static pod's cgroup and start hsmd, which drops its own rights")
	}
	for _, tool := range []string{"softhsm2-util", "pkcs11-tool"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", fmt.Errorf("%w (apt-get install softhsm2 opensc)", err)
		}
	}
	hsmd = os.Getenv("HSMD")
	if hsmd == "" {
		hsmd = "../../target/dist/hsmd"
	}
	if hsmd, err = filepath.Abs(hsmd); err != nil {
		return "", err
	}
	if _, err := os.Stat(hsmd); err != nil {
		return "", fmt.Errorf("no daemon to test (build the release binaries or name it in HSMD): %w", err)
	}
	return hsmd, nil
}

// withoutRootsFiles drops the flags by which `go test` names files that only root may write.
func withoutRootsFiles(args []string) []string {
	var kept []string
	for _, arg := range args {
		if !strings.HasPrefix(arg, "-test.testlogfile=") {
			kept = append(kept, arg)
		}
	}
	return kept
}

// staticPod is what hsmd looks for to tell kube-apiserver from every other process: a cgroup as the kubelet makes it,
// and the log folder of a static pod of that name and UID.
type staticPod struct {
	folder string
	cgroup *os.File
	// logs is a log folder that tests name in a configuration.
	logs string
	// builtin is the pod's folder where hsmd looks while it has no configuration.
	builtin string
}

func makeStaticPod(logs string) (*staticPod, error) {
	uid := randomHex(16)
	name := "kube-system_kube-apiserver-node-1_" + uid
	builtin := filepath.Join("/var/log/pods", name)
	for _, folder := range []string{filepath.Join(logs, name), builtin} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return nil, err
		}
	}
	hierarchy, err := cgroup2Mount()
	if err != nil {
		return nil, err
	}
	pod := filepath.Join(hierarchy, "kubepods", "burstable", "pod"+uid)
	container := filepath.Join(pod, randomHex(32))
	if err := os.MkdirAll(container, 0o755); err != nil {
		return nil, fmt.Errorf("make the static pod's cgroup: %w", err)
	}
	cgroup, err := os.Open(container)
	if err != nil {
		return nil, err
	}
	return &staticPod{folder: pod, cgroup: cgroup, logs: logs, builtin: builtin}, nil
}

func (p *staticPod) remove() {
	// A cgroup is removed by rmdir alone, the innermost first; kubepods stays when others are in it.
	_ = os.Remove(p.cgroup.Name())
	_ = os.Remove(p.folder)
	_ = os.Remove(filepath.Dir(p.folder))
	_ = os.Remove(filepath.Dir(filepath.Dir(p.folder)))
	_ = os.Remove(p.builtin)
	_ = os.Remove(filepath.Dir(p.builtin))
	p.cgroup.Close()
}

// cgroup2Mount finds the cgroup2 hierarchy: at the root of a node of today, beside the old ones on a hybrid host.
func cgroup2Mount() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	return "", errors.New("no cgroup2 hierarchy is mounted, and hsmd knows kube-apiserver by its cgroup (mount -t cgroup2 none /sys/fs/cgroup)")
}

func socketPair() (net.Conn, *os.File, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours := os.NewFile(uintptr(fds[0]), "tests")
	defer ours.Close()
	line, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, err
	}
	return line, os.NewFile(uintptr(fds[1]), "keeper"), nil
}

func randomHex(bytes int) string {
	random := make([]byte, bytes)
	rand.Read(random) // never fails
	return hex.EncodeToString(random)
}
