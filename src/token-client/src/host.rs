//! Where hosts come from: processes, or in tests a task in memory.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::channel;
use crate::config::Launch;
#[cfg(any(test, feature = "fake"))]
use crate::fake::{Fake, FakeHost};
use crate::output;
use crate::spawn::{Launcher, Process};

/// Starts the hosts of one token.
pub(crate) enum Hosts {
    Processes {
        token: String,
        launch: Arc<Launch>,
        /// Made at the first start, so that a machine out of threads is a token that is down.
        launcher: Option<Launcher>,
    },
    #[cfg(any(test, feature = "fake"))]
    Fakes(Fake),
}

/// One host. Dropping it kills it.
pub(crate) enum Host {
    Process {
        process: Process,
        /// Dropped with it: nobody waits for more output then.
        _output: oneshot::Sender<()>,
    },
    #[cfg(any(test, feature = "fake"))]
    Fake(FakeHost),
}

impl Hosts {
    pub(crate) fn processes(token: String, launch: Launch) -> Self {
        Self::Processes {
            token,
            launch: Arc::new(launch),
            launcher: None,
        }
    }

    /// A host that waits for its first request, and our end of its channel.
    pub(crate) async fn start(&mut self) -> io::Result<(Host, OwnedFd)> {
        let (ours, theirs) = channel::pair()?;
        let host = match self {
            Self::Processes {
                token,
                launch,
                launcher,
            } => {
                let launcher = match launcher {
                    Some(launcher) => launcher,
                    None => launcher.insert(Launcher::new(token, Arc::clone(launch))?),
                };
                let (process, pipe) = launcher.start(theirs).await?;
                let (output, gone) = oneshot::channel();
                tokio::spawn(output::read(token.clone(), process.pid(), pipe, gone));
                Host::Process {
                    process,
                    _output: output,
                }
            }
            #[cfg(any(test, feature = "fake"))]
            Self::Fakes(fake) => Host::Fake(fake.start(theirs)?),
        };
        Ok((host, ours))
    }
}

impl Host {
    pub(crate) fn pid(&self) -> Option<u32> {
        match self {
            Self::Process { process, .. } => Some(process.pid()),
            #[cfg(any(test, feature = "fake"))]
            Self::Fake(_) => None,
        }
    }

    pub(crate) fn kill(&self) {
        match self {
            Self::Process { process, .. } => process.kill(),
            #[cfg(any(test, feature = "fake"))]
            Self::Fake(host) => host.kill(),
        }
    }

    /// How it ended, once it has.
    pub(crate) async fn ended(&mut self) -> String {
        match self {
            Self::Process { process, .. } => process.ended().await,
            #[cfg(any(test, feature = "fake"))]
            Self::Fake(host) => host.ended().await,
        }
    }
}
