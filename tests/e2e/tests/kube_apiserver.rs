//! A real kube-apiserver and a real etcd over the release binaries.
//!
//! Run by `hack/test e2e`, which builds the parts and names them in the environment. One at a time
//! (`--test-threads=1`): each test starts several servers on two cores.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::cluster::{ApiServer, Credentials, Etcd, STORED_PREFIX};
use e2e::daemon::{Daemon, configuration};
use e2e::softhsm::SoftHsm;
use e2e::story;
use e2e::workbench::Workbench;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn secrets_are_sealed_in_etcd_and_survive_a_killed_host_a_killed_daemon_and_a_lost_token()
-> Result<()> {
    story::play(&Workbench::open()?)
}

/// Writers at work without a pause while host and daemon are killed again and again and servers come
/// and go: what the API server accepted can be read, byte for byte, by a server that was not there.
#[test]
fn every_secret_that_was_accepted_under_kills_is_read_back_by_a_fresh_server() -> Result<()> {
    const ROUNDS: u32 = 3;
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    let mut daemon = Daemon::start(&bench)?;
    daemon.wait_ready(Duration::from_secs(15))?;
    let socket = daemon.socket.clone();
    let etcd = Etcd::start(&bench)?;
    let credentials = Credentials::make(&bench)?;

    let accepted = Mutex::new(Vec::new());
    let number = AtomicU32::new(0);
    for round in 0..ROUNDS {
        let server = ApiServer::start(
            &bench,
            &etcd,
            &credentials,
            &socket,
            &format!("loaded-{round}"),
        )?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let n = number.fetch_add(1, Ordering::Relaxed);
                        if server
                            .create_secret(&format!("load-{n}"), &value(n))
                            .is_ok()
                        {
                            accepted.lock().unwrap().push(n);
                        }
                    }
                });
            }
            let killed = kill_things(&bench, &mut daemon);
            stop.store(true, Ordering::Relaxed);
            killed
        })?;
        daemon.wait_ready(Duration::from_secs(15))?;
    }

    let accepted = accepted.into_inner()?;
    ensure!(
        accepted.len() > 50,
        "only {} Secrets were accepted: that was no load",
        accepted.len()
    );
    let fresh = ApiServer::start(&bench, &etcd, &credentials, &socket, "fresh")?;
    let before = daemon.counts()?;
    for n in &accepted {
        let read = fresh.secret(&format!("load-{n}"))?;
        ensure!(read == value(*n), "load-{n} reads as {read:?}");
    }
    let stored = etcd.values("/registry/secrets/default/load-")?;
    ensure!(
        stored.len() >= accepted.len(),
        "etcd holds {} of {}",
        stored.len(),
        accepted.len()
    );
    ensure!(
        stored
            .iter()
            .all(|value| value.starts_with(STORED_PREFIX.as_bytes())),
        "a Secret is in etcd without being sealed"
    );
    println!(
        "{} Secrets accepted under {ROUNDS} rounds of kills, all read back; the daemon had decrypted {} seeds for the fresh server",
        accepted.len(),
        before.decrypt
    );
    Ok(())
}

fn value(n: u32) -> String {
    format!("the value of number {n}")
}

fn kill_things(bench: &Workbench, daemon: &mut Daemon) -> Result<()> {
    for blow in 0..6 {
        std::thread::sleep(Duration::from_millis(700));
        if blow % 3 == 2 {
            daemon.process().kill();
            *daemon = Daemon::start(bench)?;
        } else if let Ok(pid) = daemon.host_pid() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).context("the host is gone already")?;
        }
    }
    Ok(())
}

/// kube-apiserver keeps the plugin's answer for 20 s, so a restart of hsmd must not be noticed at all.
#[test]
fn an_orderly_restart_of_the_daemon_is_not_seen_by_a_running_server() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    let mut daemon = Daemon::start(&bench)?;
    daemon.wait_ready(Duration::from_secs(15))?;
    let etcd = Etcd::start(&bench)?;
    let credentials = Credentials::make(&bench)?;
    let server = ApiServer::start(
        &bench,
        &etcd,
        &credentials,
        &daemon.socket,
        "kube-apiserver",
    )?;

    let took = daemon.process().terminate(Duration::from_secs(5))?;
    daemon = Daemon::start(&bench)?;
    daemon.wait_ready(Duration::from_secs(15))?;
    // Longer than the API server trusts its last answer: it has to ask the new daemon.
    let until = Instant::now() + Duration::from_secs(25);
    while Instant::now() < until {
        let (ready, text) = server.readyz()?;
        ensure!(ready, "kube-apiserver became unready: {text}");
        std::thread::sleep(Duration::from_millis(500));
    }
    server.create_secret("after-restart", "x")?;
    println!("SIGTERM to exit took {took:?}");
    ensure!(
        daemon.status()?["kms"]["counters"]["status"]
            .as_u64()
            .unwrap_or(0)
            > 0,
        "the new daemon was never asked"
    );
    Ok(())
}
