//! Listens at a place, whatever becomes of the place.
//!
//! **Expected flow.** [`open`] tries at once, so that the default sockets answer before anything
//! else is done, and goes on in a task of its own: it waits for a folder that does not exist yet
//! (on Talos `/var` is mounted after us), asks again for a name that somebody else holds, and binds
//! anew when its file is removed or replaced.
//!
//! **Guarantees.** A socket file has its owner and mode before it has its name, also in a folder
//! whose owner is hostile. A stale socket file is replaced; a file that is no socket, and a socket
//! that somebody listens on, never. No failure ends the task.
//!
//! **Assumptions.** The folders above the socket's own are changed by root alone. System calls on
//! local filesystems return soon: they are made on the runtime's thread.
//!
//! **Caveats.** An abstract name that is held by a process which does not listen cannot be asked
//! who that is.

mod path;
mod probe;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};

pub(crate) use hsm_config::Endpoint;
pub(crate) use probe::Holder;

use path::FileId;

/// Connections at one endpoint. A kube-apiserver holds one for each KMS provider of its
/// configuration, twice that while it loads a new one; a node may run two for a moment while its
/// static pod is replaced. With eight providers: 8 · 2 · 2 = 32, doubled.
const CONNECTION_LIMIT: usize = 64;
/// Accepted connections that nobody has taken yet; beyond that they wait in the kernel's backlog.
const HANDOVER_LIMIT: usize = 16;
/// How soon a folder that appears is noticed. kube-apiserver is started seconds after its folder is
/// made.
const FOLDER_POLL: Duration = Duration::from_millis(250);
/// How often a name that is taken, or a place that failed, is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How soon a socket file that was removed or replaced is noticed.
const FILE_POLL: Duration = Duration::from_secs(2);
/// First and longest pause after an `accept` that failed for want of something.
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// One line about connections beyond the limit in this time.
const QUIET: Duration = Duration::from_secs(10);

/// How listening goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Clients can connect.
    Listening,
    /// The place does not exist yet.
    Waiting {
        /// What is waited for.
        reason: String,
    },
    /// Somebody else listens there. An alarm: kube-apiserver would hand them its seeds.
    Taken {
        /// Who it is.
        holder: Holder,
    },
    /// The place cannot be used as it is.
    Failed {
        /// Why not, and what to do.
        reason: String,
    },
}

impl State {
    /// A short stable name.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Listening => "listening",
            Self::Waiting { .. } => "waiting",
            Self::Taken { .. } => "taken",
            Self::Failed { .. } => "failed",
        }
    }

    /// Why nobody can connect, if nobody can.
    pub(crate) fn reason(&self) -> Option<String> {
        match self {
            Self::Listening => None,
            Self::Waiting { reason } | Self::Failed { reason } => Some(reason.clone()),
            Self::Taken { holder } => Some(holder.to_string()),
        }
    }
}

/// A handle on a place that is listened at. Dropping it stops the listening.
#[derive(Debug)]
pub(crate) struct Listener {
    endpoint: Endpoint,
    state: watch::Receiver<State>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// The connections that come in. Ends when its [`Listener`] is closed.
#[derive(Debug)]
pub(crate) struct Incoming(mpsc::Receiver<Connection>);

/// A connection that was accepted.
#[derive(Debug)]
pub(crate) struct Connection {
    /// To be asked who is at its other end before it is read from.
    pub(crate) stream: UnixStream,
    /// To be kept as long as the stream.
    pub(crate) share: Share,
}

/// One of the connections that an endpoint may have.
#[derive(Debug)]
pub(crate) struct Share(
    #[expect(dead_code, reason = "given back when dropped")] OwnedSemaphorePermit,
);

/// Begins to listen, within a runtime.
///
/// The first attempt has been made when this returns. `host_proc` is where the cgroup of somebody
/// who holds the name is looked up.
pub(crate) fn open(endpoint: Endpoint, host_proc: &Path) -> (Listener, Incoming) {
    let mut place = Place {
        endpoint: endpoint.clone(),
        host_proc: host_proc.to_owned(),
        said: None,
    };
    // A listener of this process that is about to be closed gives way, so that there is no moment
    // without one. It does so only to one that is being opened: otherwise two would go on taking
    // the name from each other.
    let first = place.bind(true);
    let (publish, state) = watch::channel(first.state());
    let (handover, incoming) = mpsc::channel(HANDOVER_LIMIT);
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(place.run(first, publish, handover, stopped));
    (
        Listener {
            endpoint,
            state,
            stop,
            task,
        },
        Incoming(incoming),
    )
}

impl Listener {
    /// Where it listens.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// How it goes, now and later.
    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Stops listening: the socket file is gone, and its connections live on, when this returns.
    pub(crate) async fn close(self) {
        drop(self.stop);
        // Its only failure would be a panic, which has been reported where it was.
        let _ = self.task.await;
    }
}

/// One attempt to listen.
enum Attempt {
    Bound(UnixListener, Option<FileId>),
    Not(State),
}

impl Attempt {
    fn state(&self) -> State {
        match self {
            Self::Bound(..) => State::Listening,
            Self::Not(state) => state.clone(),
        }
    }
}

/// Why serving at a bound socket came to an end.
enum End {
    Stopped,
    Lost,
}

struct Place {
    endpoint: Endpoint,
    host_proc: PathBuf,
    /// The state that was logged last: each is logged once, however often it is found again.
    said: Option<State>,
}

impl Place {
    async fn run(
        mut self,
        mut attempt: Attempt,
        publish: watch::Sender<State>,
        handover: mpsc::Sender<Connection>,
        mut stopped: oneshot::Receiver<()>,
    ) {
        let shares = Arc::new(Semaphore::new(CONNECTION_LIMIT));
        loop {
            publish.send_if_modified(|state| {
                let new = attempt.state();
                let modified = *state != new;
                *state = new;
                modified
            });
            match attempt {
                Attempt::Bound(socket, file) => match self
                    .serve(&socket, file, &shares, &handover, &mut stopped)
                    .await
                {
                    End::Stopped => {
                        if let (Endpoint::Path { path, .. }, Some(file)) = (&self.endpoint, file) {
                            path::remove(path, file);
                        }
                        return;
                    }
                    End::Lost => {}
                },
                Attempt::Not(state) => {
                    let pause = if matches!(state, State::Waiting { .. }) {
                        FOLDER_POLL
                    } else {
                        RETRY
                    };
                    tokio::select! {
                        biased;
                        _ = &mut stopped => return,
                        () = handover.closed() => return,
                        () = sleep(pause) => {}
                    }
                }
            }
            attempt = self.bind(false);
        }
    }

    /// Accepts until told to stop, or until the socket's file is not ours any more.
    async fn serve(
        &self,
        socket: &UnixListener,
        file: Option<FileId>,
        shares: &Arc<Semaphore>,
        handover: &mpsc::Sender<Connection>,
        stopped: &mut oneshot::Receiver<()>,
    ) -> End {
        let mut look = interval(FILE_POLL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pause = ACCEPT_PAUSE.0;
        let mut said_full = None::<Instant>;
        loop {
            let accepted = tokio::select! {
                biased;
                _ = &mut *stopped => return End::Stopped,
                () = handover.closed() => return End::Stopped,
                _ = look.tick() => {
                    if let (Endpoint::Path { path, .. }, Some(file)) = (&self.endpoint, file)
                        && path::is_lost(path, file)
                    {
                        tracing::warn!(endpoint = %self.endpoint, "the socket was removed or replaced; listening anew");
                        return End::Lost;
                    }
                    continue;
                }
                accepted = socket.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                // The client has gone again; the next may be waiting already.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                    ) =>
                {
                    continue;
                }
                Err(error) => {
                    tracing::warn!(endpoint = %self.endpoint, %error, "cannot accept a connection; trying again in {pause:?}");
                    tokio::select! {
                        _ = &mut *stopped => return End::Stopped,
                        () = sleep(pause) => {}
                    }
                    pause = (pause * 2).min(ACCEPT_PAUSE.1);
                    continue;
                }
            };
            pause = ACCEPT_PAUSE.0;
            let Ok(share) = shares.clone().try_acquire_owned() else {
                if said_full.is_none_or(|said| said.elapsed() >= QUIET) {
                    said_full = Some(Instant::now());
                    tracing::warn!(endpoint = %self.endpoint, "{CONNECTION_LIMIT} connections are open already; closing new ones");
                }
                continue;
            };
            tokio::select! {
                _ = &mut *stopped => return End::Stopped,
                sent = handover.send(Connection { stream, share: Share(share) }) => {
                    if sent.is_err() {
                        return End::Stopped;
                    }
                }
            }
        }
    }

    fn bind(&mut self, instead_of_our_own: bool) -> Attempt {
        let attempt = match &self.endpoint {
            Endpoint::Path {
                path,
                mode,
                uid,
                gid,
            } => {
                let owner = path::Owner {
                    mode: *mode,
                    uid: *uid,
                    gid: *gid,
                };
                path::bind(path, owner, instead_of_our_own, &self.host_proc)
                    .map(|(socket, file)| (socket, Some(file)))
            }
            Endpoint::Abstract(name) => {
                probe::bind_abstract(name, &self.host_proc).map(|socket| (socket, None))
            }
        }
        .and_then(|(socket, file)| match UnixListener::from_std(socket) {
            Ok(socket) => Ok((socket, file)),
            Err(error) => Err(State::Failed {
                reason: format!("cannot be watched for connections: {error}"),
            }),
        });
        let attempt = match attempt {
            Ok((socket, file)) => Attempt::Bound(socket, file),
            Err(state) => Attempt::Not(state),
        };
        self.say(attempt.state());
        attempt
    }

    fn say(&mut self, state: State) {
        if self.said.as_ref() == Some(&state) {
            return;
        }
        let endpoint = &self.endpoint;
        match &state {
            State::Listening => tracing::info!(%endpoint, "listening"),
            State::Waiting { reason } => tracing::info!(%endpoint, "not listening yet: {reason}"),
            State::Taken { holder } => tracing::error!(%endpoint, "ALARM: {holder}"),
            State::Failed { reason } => tracing::error!(%endpoint, "cannot listen: {reason}"),
        }
        self.said = Some(state);
    }
}

impl Incoming {
    /// The next connection; none when the listener was closed. Nothing is lost if this is dropped
    /// while it waits.
    pub(crate) async fn next(&mut self) -> Option<Connection> {
        self.0.recv().await
    }
}
