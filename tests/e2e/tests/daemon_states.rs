//! Whatever is missing, broken or away, hsmd stays up and says what it lacks: on its health socket, in
//! its log, and to kube-apiserver.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::daemon::{Daemon, configuration};
use e2e::softhsm::{MODULE, SoftHsm, TOKEN};
use e2e::wait_for;
use e2e::workbench::{Workbench, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(15);
const CONFIG: &str = "hsmd.yaml";

fn readyz_says(daemon: &Daemon, wanted: &str) -> Result<()> {
    wait_for(&format!("/readyz says {wanted:?}"), SOON, || {
        let (code, text) = daemon.readyz()?;
        ensure!(
            code == 503 && text.contains(wanted),
            "/readyz is {code}: {text}"
        );
        Ok(())
    })
}

/// Edits the configuration as a person with an editor does: a new file in the old one's place.
fn edit(bench: &Workbench, from: &str, to: &str) -> Result<()> {
    let path = bench.path().join(CONFIG);
    let text = fs::read_to_string(&path)?;
    ensure!(
        text.contains(from),
        "the configuration does not contain {from:?}"
    );
    bench.write("edited", &text.replacen(from, to, 1), 0)?;
    fs::rename(bench.path().join("edited"), path)?;
    Ok(())
}

#[test]
fn without_a_configuration_it_answers_that_it_is_unconfigured_and_takes_one_that_appears()
-> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    let mut daemon = Daemon::start(&bench)?;
    readyz_says(&daemon, "unconfigured")?;
    let status = daemon.call(&bench, "Status", &[])?;
    ensure!(
        status.code == Some(14) && status.message.contains("unconfigured"),
        "Status answers {status:?}"
    );

    configuration(&bench, &token)?;
    daemon.wait_ready(SOON)?;
    let status = daemon.call(&bench, "Status", &[])?;
    ensure!(status.code == Some(0), "Status answers {status:?}");

    fs::remove_file(bench.path().join(CONFIG))?;
    readyz_says(&daemon, "unconfigured")?;
    daemon.process().still_runs()
}

#[test]
fn a_broken_configuration_is_named_with_its_line_and_a_mended_one_is_taken() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    edit(&bench, "  keys:", "  keyss:")?;
    let mut daemon = Daemon::start(&bench)?;
    readyz_says(&daemon, "the configuration is broken")?;
    let status = daemon.status()?;
    ensure!(status["configuration"]["state"] == "broken", "{status}");
    let rejected = status["configuration"]["rejected"]
        .as_str()
        .unwrap_or_default();
    ensure!(
        rejected.contains("keyss") && rejected.contains("`keys`"),
        "{rejected}"
    );

    edit(&bench, "  keyss:", "  keys:")?;
    daemon.wait_ready(SOON)?;

    // Broken again: what runs stays, and says that the newest file was not taken.
    edit(&bench, "epoch: 1", "epoch: one")?;
    wait_for("the status page tells of the rejected file", SOON, || {
        let status = daemon.status()?;
        ensure!(
            status["configuration"]["rejected"].is_string(),
            "nothing was rejected"
        );
        ensure!(
            status["configuration"]["state"] == "loaded",
            "the old one is gone"
        );
        Ok(())
    })?;
    daemon.wait_ready(SOON)?;
    ensure!(
        daemon.process().log().contains("the old one stays"),
        "the log does not tell"
    );
    Ok(())
}

#[test]
fn a_step_that_would_strand_secrets_is_refused_and_the_old_configuration_stays() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    token.generate_key("second", "02")?;
    configuration(&bench, &token)?;
    let mut daemon = Daemon::start(&bench)?;
    daemon.wait_ready(SOON)?;
    let key_id = daemon.status()?["kms"]["key_id"].clone();

    edit(&bench, "object=k8s-secrets-kek", "object=second")?;
    wait_for("the illegal step is told of", SOON, || {
        let status = daemon.status()?;
        let why = status["configuration"]["rejected"]
            .as_str()
            .context("nothing was rejected")?;
        ensure!(
            why.contains("epoch 1"),
            "rejected for another reason: {why}"
        );
        Ok(())
    })?;
    ensure!(
        daemon.status()?["kms"]["key_id"] == key_id,
        "the key changed"
    );
    daemon.wait_ready(SOON)
}

#[test]
fn an_absent_module_is_named_and_so_is_a_token_that_is_not_there() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    edit(&bench, MODULE, "/usr/lib/no-such-module.so")?;
    let mut daemon = Daemon::start(&bench)?;
    readyz_says(&daemon, "/usr/lib/no-such-module.so")?;
    edit(&bench, "/usr/lib/no-such-module.so", MODULE)?;
    daemon.wait_ready(SOON)?;
    daemon.process().terminate(Duration::from_secs(5))?;

    let elsewhere = format!("token={TOKEN}");
    edit(&bench, &elsewhere, "token=elsewhere")?;
    edit(&bench, &elsewhere, "token=elsewhere")?;
    daemon = Daemon::start(&bench)?;
    // The labels that are there tell a misspelt one from an HSM that is away.
    readyz_says(&daemon, TOKEN)?;
    daemon.process().still_runs()
}

#[test]
fn a_token_that_is_away_at_the_start_is_used_when_it_comes() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    token.take_away()?;
    let mut daemon = Daemon::start(&bench)?;
    readyz_says(&daemon, "token `main` is down")?;
    token.bring_back()?;
    daemon.wait_ready(SOON)
}

#[test]
fn a_wrong_pin_is_tried_once_over_restarts_and_a_raised_generation_tries_again() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    bench.write("pin", "wrong", 0)?;
    let mut daemon = Daemon::start(&bench)?;
    readyz_says(&daemon, "latched")?;
    let status = daemon.status()?;
    ensure!(status["tokens"][0]["state"] == "latched", "{status}");

    // The right PIN under the old generation is not tried: nobody said that it was changed.
    bench.write("pin", token.pin(), 0)?;
    daemon.process().terminate(Duration::from_secs(5))?;
    daemon = Daemon::start(&bench)?;
    readyz_says(&daemon, "latched")?;

    let file = format!("pin: {{file: {}", token.pin_file.display());
    edit(&bench, &file, &format!("{file}, generation: 2"))?;
    daemon.wait_ready(SOON)
}

#[test]
fn sighup_reads_the_configuration_again() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    let mut daemon = Daemon::start(&bench)?;
    daemon.wait_ready(SOON)?;
    let before = daemon.status()?["configuration"]["loaded_at"].clone();
    // The page tells seconds.
    std::thread::sleep(Duration::from_millis(1100));
    kill(Pid::from_raw(daemon.process().pid()), Signal::SIGHUP)?;
    wait_for("the configuration was read again", SOON, || {
        let now = daemon.status()?["configuration"]["loaded_at"].clone();
        ensure!(now != before, "it was not");
        Ok(())
    })?;
    daemon.wait_ready(SOON)
}

#[test]
fn sigterm_lets_a_call_under_way_be_answered_and_ends_within_five_seconds() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    let mut daemon = Daemon::start(&bench)?;
    daemon.wait_ready(SOON)?;
    let plaintext = [&[0x0a, 32][..], &[7; 32]].concat();

    // All of the host's processes: the one we know and the module's beneath it.
    let hosts = family(daemon.host_pid()?)?;
    signal_all(&hosts, Signal::SIGSTOP)?;
    std::thread::scope(|scope| -> Result<()> {
        let (daemon_ref, bench_ref) = (&daemon, &bench);
        let call = scope.spawn(move || daemon_ref.call(bench_ref, "Encrypt", &plaintext));
        std::thread::sleep(Duration::from_millis(500));
        kill(Pid::from_raw(daemon.pid()), Signal::SIGTERM)?;
        std::thread::sleep(Duration::from_millis(500));
        signal_all(&hosts, Signal::SIGCONT)?;
        let Ok(answer) = call.join() else {
            bail!("the caller panicked")
        };
        let answer = answer?;
        let envelope = answer.body.windows(4).any(|bytes| bytes == b"THSM");
        ensure!(envelope, "the call under way was answered {answer:?}");
        Ok(())
    })?;
    wait_for("hsmd has ended", Duration::from_secs(5), || {
        match daemon.process().still_runs() {
            Err(_) => Ok(()),
            Ok(()) => bail!("it runs"),
        }
    })
}

#[test]
fn as_pid_1_it_reaps_orphans() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    let mut daemon = Daemon::start_as_pid_1(&bench)?;
    daemon.wait_ready(SOON)?;
    let init = *family(daemon.pid())?
        .get(1)
        .context("unshare has no child")?;
    // A child of a shell that is gone: an orphan of the namespace's PID 1.
    run(
        "nsenter",
        &[
            "-t",
            &init.to_string(),
            "-p",
            "-m",
            "sh",
            "-c",
            "sleep 0.3 & exit 0",
        ],
    )?;
    std::thread::sleep(Duration::from_millis(600));
    wait_for("no child of PID 1 is a zombie", SOON, || {
        for pid in family(init)? {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            ensure!(!stat.contains(") Z "), "{pid} is a zombie: {stat}");
        }
        Ok(())
    })?;
    daemon.wait_ready(SOON)
}

#[test]
fn the_pin_appears_in_no_log_no_command_line_and_no_environment() -> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    configuration(&bench, &token)?;
    let mut daemon = Daemon::start(&bench)?;
    daemon.wait_ready(SOON)?;
    let status = daemon.status()?.to_string();
    ensure!(
        !status.contains(token.pin()),
        "the status page shows the PIN"
    );
    for pid in family(daemon.pid())? {
        for file in ["cmdline", "environ"] {
            let path = format!("/proc/{pid}/{file}");
            let bytes = fs::read(&path).with_context(|| format!("cannot read {path}"))?;
            let text = String::from_utf8_lossy(&bytes);
            ensure!(!text.contains(token.pin()), "{path} holds the PIN");
        }
    }
    ensure!(
        !daemon.process().log().contains(token.pin()),
        "the log holds the PIN"
    );
    ensure!(
        daemon.process().log().contains(TOKEN) || !daemon.process().log().is_empty(),
        "there is no log"
    );
    Ok(())
}

/// A process and everything below it.
fn family(pid: i32) -> Result<Vec<i32>> {
    let mut pids = vec![pid];
    let mut next = 0;
    while let Some(pid) = pids.get(next).copied() {
        next += 1;
        let children =
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        // Children are listed by the thread that made them.
        let mut all = children;
        for thread in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if thread.file_name().to_string_lossy() != pid.to_string() {
                all += &fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            }
        }
        pids.extend(
            all.split_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    Ok(pids)
}

fn signal_all(pids: &[i32], signal: Signal) -> Result<()> {
    for pid in pids {
        kill(Pid::from_raw(*pid), signal).with_context(|| format!("cannot signal {pid}"))?;
    }
    Ok(())
}
