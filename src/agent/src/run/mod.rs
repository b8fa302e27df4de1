//! Wiring: sockets, configuration, tokens, face, signals. One thread runs it all.
//!
//! *Expected flow*: harden, bind the default sockets, answer (that nothing is configured), watch the
//! configuration file, take it when it is complete and legal, start its tokens, be ready.
//! *Guarantees*: nothing that is missing, broken or away ends the process; only SIGTERM and SIGINT do,
//! within [`STOP_LIMIT`]. A new configuration is applied as a whole or not at all.
//! *Assumptions*: whoever started us starts us again if we crash.

#[cfg(test)]
mod interleavings;
mod page;
mod reaper;
mod setup;
mod sockets;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hsm_config::{Config, plan, report};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;

use crate::health;
use crate::kms::{self, Face};
use crate::listen::{self, Endpoint, Listener};
use crate::peer::Rules;
use crate::reload::{Change, Watch};
use crate::telemetry::{self, LogFormat};
use page::Page;
use setup::Setup;
use sockets::{Gate, Sockets};

/// From SIGTERM to the end of the process; Talos and kubelet send SIGKILL after 10 s.
const STOP_LIMIT: Duration = Duration::from_millis(4500);

/// What the command line says.
pub(crate) struct Settings {
    /// The configuration file; it may not exist (yet).
    pub(crate) config: PathBuf,
    /// KMS sockets until a configuration with `kms.listen` replaces them.
    pub(crate) listen: Vec<Endpoint>,
    /// The health socket, if the command line names one: it then wins over the configuration.
    pub(crate) health: Option<Endpoint>,
    /// Form of the log.
    pub(crate) log_format: LogFormat,
}

/// Runs until a signal ends it.
pub(crate) fn run(settings: Settings) -> ExitCode {
    telemetry::start(settings.log_format);
    harden();
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| {
            let outcome = runtime.block_on(async { Daemon::start(settings)?.serve().await });
            // A thread that hangs in a file system must not hold us.
            runtime.shutdown_timeout(Duration::from_millis(200));
            outcome
        });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the kernel gives no event loop or signal handler");
            ExitCode::FAILURE
        }
    }
}

/// Seeds pass through our memory: no core dump, no debugger of another process of ours, no swap.
fn harden() {
    umask(Mode::from_bits_truncate(0o077));
    let done = setrlimit(Resource::RLIMIT_CORE, 0, 0).and(nix::sys::prctl::set_dumpable(false));
    if let Err(error) = done {
        tracing::warn!(%error, "core dumps of this process cannot be ruled out");
    }
    // Pages are locked as they are touched: all of a thread's stack at once would cost megabytes.
    let on_fault = MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT);
    let all = MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault;
    if let Err(error) = mlockall(all) {
        tracing::warn!(%error, "memory cannot be locked; keep swap off on this node");
    }
}

struct Daemon {
    settings: Settings,
    face: Arc<Face>,
    rules: Arc<RwLock<Rules>>,
    page: Arc<Page>,
    sockets: Sockets,
    health: HealthSocket,
    setup: Option<Setup>,
    /// The last configuration that was in force: a later one must be a legal step from it, also when
    /// the file was gone in between.
    last: Option<Config>,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Daemon {
    fn start(settings: Settings) -> io::Result<Self> {
        let why = format!("unconfigured: {} does not exist", settings.config.display());
        let face = Face::new(&why);
        let rules = Arc::new(RwLock::new(Rules::default()));
        let page = Page::new(Arc::clone(&face), settings.config.clone());
        let sockets = Sockets::new(Gate {
            face: Arc::clone(&face),
            rules: Arc::clone(&rules),
            complaints: Arc::default(),
        });
        let health = HealthSocket::closed(Arc::clone(&page));
        Ok(Self {
            settings,
            face,
            rules,
            page,
            sockets,
            health,
            setup: None,
            last: None,
        })
    }

    async fn serve(mut self) -> io::Result<()> {
        // First of all, so that kube-apiserver finds somebody: its next try may be two minutes away.
        self.sockets.set(&self.settings.listen.clone()).await;
        self.page.set_sockets(self.sockets.states());
        self.health.set(self.health_endpoint(None)).await;
        let mut signals = Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        };
        reaper::start()?;
        tokio::spawn(kms::probe(Arc::clone(&self.face)));
        tracing::info!(version = env!("CARGO_PKG_VERSION"), file = %self.settings.config.display(), "hsmd is up");

        let mut watch = Watch::new(&self.settings.config);
        loop {
            tokio::select! {
                _ = signals.terminate.recv() => break,
                _ = signals.interrupt.recv() => break,
                _ = signals.hangup.recv() => watch.poke(),
                change = watch.next() => self.change(change).await,
            }
        }
        self.stop().await;
        Ok(())
    }

    async fn change(&mut self, change: Change) {
        match change {
            Change::Changed(bytes) => {
                let file = self.settings.config.display().to_string();
                let config = hsm_config::decode(bytes, &file)
                    .and_then(|text| hsm_config::parse(&text, &file))
                    .map_err(|errors| errors.report());
                match config {
                    Ok(config) => self.take(config).await,
                    Err(report) => self.reject(&report),
                }
            }
            Change::Removed => self.remove().await,
        }
    }

    async fn take(&mut self, config: Config) {
        if let Some(last) = &self.last
            && let Err(illegal) = plan::check(last, &config)
        {
            return self.reject(&report::chain(&illegal, Some(&illegal.hint())));
        }
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = config.kms.peers.clone();
        let listen = config
            .kms
            .listen
            .clone()
            .unwrap_or_else(|| self.settings.listen.clone());
        self.sockets.set(&listen).await;
        self.page.set_sockets(self.sockets.states());
        self.health
            .set(self.health_endpoint(config.health_listen.clone()))
            .await;
        self.setup = Some(Setup::apply(self.setup.take(), &config, &self.face).await);
        self.last = Some(config);
        self.page.taken();
        tracing::info!(file = %self.settings.config.display(), "configuration taken");
    }

    fn reject(&mut self, report: &str) {
        let first = report.lines().next().unwrap_or_default().to_owned();
        if self.setup.is_some() {
            tracing::error!(
                "the new configuration was not taken, the old one stays: {}",
                one_line(report)
            );
        } else {
            tracing::error!("the configuration is broken: {}", one_line(report));
            self.face
                .unready(&format!("the configuration is broken: {first}"));
        }
        self.page.rejected(one_line(report));
    }

    async fn remove(&mut self) {
        let why = format!(
            "unconfigured: {} does not exist",
            self.settings.config.display()
        );
        self.face.unready(&why);
        self.page.removed();
        if let Some(setup) = self.setup.take() {
            tracing::warn!("the configuration was removed; answering that nothing is configured");
            setup.stop().await;
        }
    }

    fn health_endpoint(&self, configured: Option<Endpoint>) -> Endpoint {
        let endpoint = self.settings.health.clone().or(configured);
        endpoint.unwrap_or_else(|| default_health("/run/hsm/health.sock"))
    }

    async fn stop(self) {
        tracing::info!("stopping");
        let Self {
            sockets,
            health,
            setup,
            ..
        } = self;
        let orderly = async {
            sockets.drain().await;
            if let Some(setup) = setup {
                setup.stop().await;
            }
            // Last: until then it tells what is being waited for.
            health.close().await;
        };
        if tokio::time::timeout(STOP_LIMIT, orderly).await.is_err() {
            tracing::warn!("calls were still under way after {STOP_LIMIT:?}; ending all the same");
        }
    }
}

fn one_line(report: &str) -> String {
    report.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

/// A health socket at `path`, for our own user alone.
pub(crate) fn default_health(path: impl Into<PathBuf>) -> Endpoint {
    Endpoint::Path {
        path: path.into(),
        mode: 0o600,
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
    }
}

/// The health socket, wherever it is at the moment.
struct HealthSocket {
    page: Arc<Page>,
    open: Option<(Listener, JoinHandle<()>)>,
}

impl HealthSocket {
    fn closed(page: Arc<Page>) -> Self {
        Self { page, open: None }
    }

    async fn close(self) {
        if let Some((listener, _)) = self.open {
            listener.close().await;
        }
    }

    async fn set(&mut self, endpoint: Endpoint) {
        if self
            .open
            .as_ref()
            .is_some_and(|(listener, _)| *listener.endpoint() == endpoint)
        {
            return;
        }
        if let Endpoint::Path { path, .. } = &endpoint
            && let Some(folder) = path.parent()
        {
            // On Talos /run is an empty tmpfs of the container's own. A failure shows when binding.
            let _ = std::fs::create_dir_all(folder);
        }
        let (listener, mut incoming) = listen::open(endpoint, &Rules::default().host_proc);
        let page = Arc::clone(&self.page);
        let task = tokio::spawn(async move {
            while let Some(connection) = incoming.next().await {
                let page = Arc::clone(&page) as Arc<dyn health::Source>;
                tokio::spawn(async move {
                    health::serve(page, connection.stream).await;
                    drop(connection.share);
                });
            }
        });
        if let Some((old, _)) = self.open.replace((listener, task)) {
            old.close().await;
        }
    }
}
