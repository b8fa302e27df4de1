//! The main job on real parts, and three bad days survived: what `hack/demo` shows and a test asserts.
//!
//! Every step says what was seen, and is an error if it was not seen. A fresh kube-apiserver proves
//! each recovery: a running one would answer from its memory and prove nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cluster::{ApiServer, Credentials, Etcd, STORED_PREFIX};
use crate::daemon::{Counts, Daemon, configuration};
use crate::softhsm::{KEK, SoftHsm, TOKEN};
use crate::wait_for;
use crate::workbench::Workbench;

const OLD_SECRET: &str = "written-before";
const OLD_VALUE: &str = "correct horse battery staple";

/// Plays it all on an empty workbench. An error is a step that was not seen to work.
pub fn play(bench: &Workbench) -> Result<()> {
    title("A token, a key in it, and the daemon");
    let token = SoftHsm::create(bench)?;
    say(&format!(
        "SoftHSM token `{TOKEN}` holds `{KEK}`: AES-256, sensitive, never extractable"
    ));
    configuration(bench, &token)?;
    let mut daemon = Daemon::start(bench)?;
    daemon.wait_ready(Duration::from_secs(15))?;
    let status = daemon.status()?;
    say(&format!(
        "hsmd is ready: key_id {}, mechanism {}, module host pid {}",
        status["kms"]["key_id"].as_str().unwrap_or("?"),
        status["keys"][0]["mechanism"].as_str().unwrap_or("?"),
        daemon.host_pid()?
    ));

    title("A Secret through a real kube-apiserver into a real etcd");
    let etcd = Etcd::start(bench)?;
    let credentials = Credentials::make(bench)?;
    let mut node = Node {
        bench,
        etcd,
        credentials,
        servers: 0,
        seeds: 0,
    };
    let server = node.fresh_server(&daemon)?;
    server.create_secret(OLD_SECRET, OLD_VALUE)?;
    node.seeds += 1;
    say(&format!(
        "kube-apiserver wrote the Secret `{OLD_SECRET}` = {OLD_VALUE:?}"
    ));
    node.show_stored(OLD_SECRET, OLD_VALUE)?;
    drop(server);

    title("Bad day 1: the module host is killed (kill -9)");
    let host = daemon.host_pid()?;
    kill(Pid::from_raw(host), Signal::SIGKILL)?;
    let back = measure(|| {
        wait_for(
            "another module host serves",
            Duration::from_secs(15),
            || {
                ensure!(
                    daemon.host_pid()? != host,
                    "the killed host is still listed"
                );
                Ok(())
            },
        )?;
        daemon.wait_ready(Duration::from_secs(15))
    })?;
    say(&format!(
        "pid {host} killed; the daemon started pid {} and was ready after {back:.1?}",
        daemon.host_pid()?
    ));
    let before = daemon.counts()?;
    node.prove(&daemon, before, "after-host-kill")?;

    title("Bad day 2: the daemon is killed (kill -9)");
    let pid = daemon.process().pid();
    daemon.process().kill();
    let back = measure(|| {
        daemon = Daemon::start(bench)?;
        daemon.wait_ready(Duration::from_secs(15))
    })?;
    say(&format!(
        "pid {pid} killed; pid {} took over the stale socket and was ready after {back:.1?}",
        daemon.process().pid()
    ));
    node.prove(&daemon, Counts::default(), "after-daemon-kill")?;

    title("Bad day 3: the token is taken away and brought back");
    let server = node.fresh_server(&daemon)?;
    token.take_away()?;
    let red = measure(|| {
        wait_for(
            "kube-apiserver's /readyz turns red",
            Duration::from_secs(30),
            || {
                let (ready, text) = server.readyz()?;
                ensure!(
                    !ready && text.contains("[-]kms-providers"),
                    "it is still green"
                );
                Ok(())
            },
        )
    })?;
    say(&format!(
        "kube-apiserver's /readyz is red after {red:.1?}: [-]kms-providers failed"
    ));
    let (code, reason) = daemon.readyz()?;
    ensure!(
        code == 503,
        "hsmd's own /readyz answers {code} without a token"
    );
    say(&format!("hsmd's /readyz is {code}: {}", reason.trim()));
    token.bring_back()?;
    let back = measure(|| daemon.wait_ready(Duration::from_secs(15)))?;
    say(&format!("token back; hsmd was ready after {back:.1?}"));
    drop(server);
    let before = daemon.counts()?;
    node.prove(&daemon, before, "after-token-loss")
}

/// What stays while servers and daemons come and go.
struct Node<'a> {
    bench: &'a Workbench,
    etcd: Etcd,
    credentials: Credentials,
    servers: u32,
    /// Seeds in etcd: one for each server that wrote a Secret.
    seeds: u64,
}

impl Node<'_> {
    fn fresh_server(&mut self, daemon: &Daemon) -> Result<ApiServer> {
        self.servers += 1;
        let name = format!("kube-apiserver-{}", self.servers);
        let mut server = None;
        let took = measure(|| {
            server = Some(ApiServer::start(
                self.bench,
                &self.etcd,
                &self.credentials,
                &daemon.socket,
                &name,
            )?);
            Ok(())
        })?;
        let mut server = server.context("measure ran")?;
        say(&format!(
            "fresh kube-apiserver (pid {}) is ready after {took:.1?}",
            server.process().pid()
        ));
        Ok(server)
    }

    /// A fresh server, which remembers nothing, reads the old Secret and writes a new one; the daemon
    /// is seen to have done the work.
    fn prove(&mut self, daemon: &Daemon, before: Counts, name: &str) -> Result<()> {
        let server = self.fresh_server(daemon)?;
        let value = server.secret(OLD_SECRET)?;
        ensure!(value == OLD_VALUE, "the old Secret reads as {value:?}");
        say(&format!("it reads `{OLD_SECRET}` = {value:?}"));
        let new_value = format!("value of {name}");
        server.create_secret(name, &new_value)?;
        ensure!(
            server.secret(name)? == new_value,
            "the new Secret does not read back"
        );
        say(&format!("it writes `{name}`"));
        self.show_stored(name, &new_value)?;
        let after = daemon.counts()?;
        let (encrypts, decrypts) = (
            after.encrypt - before.encrypt,
            after.decrypt - before.decrypt,
        );
        say(&format!(
            "hsmd did {encrypts} Encrypt (expected 1: the server's own seed) and {decrypts} Decrypt (expected {}: one for each seed in etcd)",
            self.seeds
        ));
        if (encrypts, decrypts) != (1, self.seeds) {
            bail!("the counters did not rise by what was expected");
        }
        self.seeds += 1;
        Ok(())
    }

    fn show_stored(&self, name: &str, clear: &str) -> Result<()> {
        let key = format!("/registry/secrets/default/{name}");
        let stored = self
            .etcd
            .raw(&key)?
            .with_context(|| format!("etcd has nothing under {key}"))?;
        ensure!(
            stored.starts_with(STORED_PREFIX.as_bytes()),
            "{key} does not begin with {STORED_PREFIX}"
        );
        let contains = stored
            .windows(clear.len())
            .any(|window| window == clear.as_bytes());
        ensure!(!contains, "the clear text is in etcd under {key}");
        say(&format!("etcd {key} ({} bytes):", stored.len()));
        say(&format!(
            "   {}…",
            printable(&stored[..stored.len().min(96)])
        ));
        say(&format!("begins with {STORED_PREFIX}, clear text absent"));
        Ok(())
    }
}

fn printable(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| {
            if (0x20..0x7f).contains(byte) {
                *byte as char
            } else {
                '·'
            }
        })
        .collect()
}

fn measure(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed())
}

fn title(text: &str) {
    println!("\n== {text}");
}

fn say(text: &str) {
    println!("   {text}");
}
