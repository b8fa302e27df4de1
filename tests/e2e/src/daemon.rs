//! hsmd, started as on a node, and what it says of itself on its health socket.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::place::{Contents, Place};
use crate::softhsm::{KEK, SoftHsm};
use crate::workbench::{Process, Workbench, run};
use crate::{part, wait_for};

/// Name of the cluster in the demo and the tests.
pub const CLUSTER: &str = "rciis-production";

/// A running hsmd.
pub struct Daemon {
    process: Process,
    health: PathBuf,
    /// The KMS socket, for the API server's EncryptionConfiguration.
    pub socket: PathBuf,
}

/// What the daemon counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Encrypts answered.
    pub encrypt: u64,
    /// Decrypts answered.
    pub decrypt: u64,
}

/// How a call was answered.
#[derive(Debug)]
pub struct Answer {
    /// gRPC status code, 0 for OK. None if curl did not wait for it: Debian 12's leaves a connection
    /// that was sent GOAWAY as soon as it has the answer's body.
    pub code: Option<u32>,
    /// Its message, percent-encoded as on the wire, or all that curl said.
    pub message: String,
    /// The framed answer; empty for an error.
    pub body: Vec<u8>,
}

/// Writes the configuration of the workbench's only node: one SoftHSM token and its KEK.
pub fn configuration(bench: &Workbench, token: &SoftHsm) -> Result<()> {
    let contents = Contents::new(CLUSTER, &[(KEK, 1, "active")]);
    Place::only(bench).configure(bench, &[token], &contents)
}

impl Daemon {
    /// Starts hsmd as the workbench's only node. It answers at once; see [`Self::wait_ready`].
    pub fn start(bench: &Workbench) -> Result<Self> {
        Self::start_at(bench, &Place::only(bench))
    }

    /// As [`Self::start`], for one of several nodes.
    pub fn start_at(bench: &Workbench, place: &Place) -> Result<Self> {
        Self::start_by(bench, place, part("HSMD")?, Vec::new())
    }

    /// As [`Self::start`], as the first process of a PID namespace, as in an extension's container.
    pub fn start_as_pid_1(bench: &Workbench) -> Result<Self> {
        let hsmd = part("HSMD")?.display().to_string();
        let arguments = ["--pid", "--fork", "--kill-child", "--mount-proc", &hsmd];
        Self::start_by(
            bench,
            &Place::only(bench),
            "unshare".into(),
            arguments.map(str::to_owned).to_vec(),
        )
    }

    fn start_by(
        bench: &Workbench,
        place: &Place,
        program: PathBuf,
        mut arguments: Vec<String>,
    ) -> Result<Self> {
        // Only kube-apiserver may look for the socket, as in /var/log/audit/kube on a node.
        bench.folder(&place.run, crate::KUBE_APISERVER_UID)?;
        arguments.extend([
            "run".to_owned(),
            format!("--config={}", place.config.display()),
            format!("--listen=unix://{}", place.socket.display()),
            format!("--health-listen=unix://{}", place.health.display()),
        ]);
        let process = bench.start(&place.name, &program, &arguments)?;
        Ok(Self {
            process,
            health: place.health.clone(),
            socket: place.socket.clone(),
        })
    }

    /// Waits until `/readyz` is green.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        wait_for("hsmd is ready", limit, || {
            self.process.still_runs()?;
            match self.readyz()? {
                (200, _) => Ok(()),
                (_, reason) => bail!("hsmd is not ready: {}", reason.trim()),
            }
        })
    }

    /// Status code and text of `/readyz`.
    pub fn readyz(&self) -> Result<(u16, String)> {
        let answer = run(
            "curl",
            &[
                "-sS",
                "--max-time",
                "5",
                "--unix-socket",
                &self.health.to_string_lossy(),
                "-w",
                "\n%{http_code}",
                "http://hsmd/readyz",
            ],
        )?;
        let (text, code) = answer
            .rsplit_once('\n')
            .context("curl wrote no status code")?;
        Ok((code.parse()?, text.to_owned()))
    }

    /// The status page.
    pub fn status(&self) -> Result<Value> {
        let text = run(
            "curl",
            &[
                "-sS",
                "--max-time",
                "5",
                "--unix-socket",
                &self.health.to_string_lossy(),
                "http://hsmd/status",
            ],
        )?;
        serde_json::from_str(&text).context("the status page is not JSON")
    }

    /// What it counted since it started.
    pub fn counts(&self) -> Result<Counts> {
        let status = self.status()?;
        let read = |name: &str| {
            status["kms"]["counters"][name]
                .as_u64()
                .with_context(|| format!("the status page has no counter {name}"))
        };
        Ok(Counts {
            encrypt: read("encrypt_ok")?,
            decrypt: read("decrypt_ok")?,
        })
    }

    /// Pid of the module host.
    pub fn host_pid(&self) -> Result<i32> {
        let status = self.status()?;
        let pid = status["tokens"][0]["host_pid"]
            .as_i64()
            .context("the token has no host")?;
        Ok(i32::try_from(pid)?)
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Calls a method as kube-apiserver, with an encoded request: what a gRPC client does, shown by
    /// curl. Deadline: 10 s.
    pub fn call(&self, bench: &Workbench, method: &str, request: &[u8]) -> Result<Answer> {
        // gRPC over HTTP/2: one byte "not compressed", four of length, the message.
        let mut message = vec![0];
        message.extend(u32::try_from(request.len())?.to_be_bytes());
        message.extend(request);
        let name = format!("call-{}", crate::workbench::random_hex(4)?);
        let body = bench.path().join(format!("{name}.request"));
        std::fs::write(&body, message)?;
        std::os::unix::fs::chown(&body, Some(crate::KUBE_APISERVER_UID), None)?;
        let answer = bench.write(&format!("{name}.answer"), "", crate::KUBE_APISERVER_UID)?;
        let arguments = [
            "-sS",
            "--max-time",
            "10",
            "--http2-prior-knowledge",
            "-D",
            "-",
            "-o",
            &answer.to_string_lossy(),
            "--unix-socket",
            &self.socket.to_string_lossy(),
            "-H",
            "content-type: application/grpc",
            "-H",
            "te: trailers",
            "-H",
            "grpc-timeout: 10S",
            "--data-binary",
            &format!("@{}", body.display()),
            &format!("http://localhost/v2.KeyManagementService/{method}"),
        ]
        .map(str::to_owned);
        let mut curl = bench.start_in_pod(&name, "curl".as_ref(), &arguments)?;
        wait_for("curl ends", Duration::from_secs(15), || {
            match curl.still_runs() {
                Ok(()) => bail!("it runs"),
                Err(_) => Ok(()),
            }
        })?;
        let headers = curl.log();
        let value = |name: &str| {
            let line = headers.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().to_owned())
        };
        Ok(Answer {
            code: value("grpc-status:").map(|code| code.parse()).transpose()?,
            message: value("grpc-message:").unwrap_or(headers),
            body: std::fs::read(answer)?,
        })
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
