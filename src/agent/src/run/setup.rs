//! From a checked configuration to running tokens and a keyring in the face.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hsm_config::Config;
use hsm_token_client::Token;
use tokio::task::JoinHandle;

use crate::keyring::{Keyring, NamedToken};
use crate::kms::Face;
use crate::pin;

/// A configuration in force.
pub(super) struct Setup {
    tokens: Vec<Running>,
}

struct Running {
    settings: hsm_config::Token,
    state_dirs: Vec<PathBuf>,
    named: NamedToken,
    watcher: JoinHandle<()>,
}

impl Setup {
    /// Starts what the configuration needs and gives the face its keyring. Tokens of `previous` whose
    /// settings are the same go on with their sessions; the others are stopped.
    pub(super) async fn apply(previous: Option<Self>, config: &Config, face: &Arc<Face>) -> Self {
        let mut old = previous.map(|setup| setup.tokens).unwrap_or_default();
        let mut tokens = Vec::new();
        for settings in &config.tokens {
            let same = old.iter().position(|running| {
                running.settings == *settings && running.state_dirs == config.state_dirs
            });
            tokens.push(match same {
                Some(index) => old.swap_remove(index),
                None => Running::start(settings.clone(), &config.state_dirs, face),
            });
        }
        let keyring = Keyring::new(
            config.clusters.clone(),
            config.kms.keys.clone(),
            tokens.iter().map(|running| running.named.clone()).collect(),
            face.keyring().ok().as_deref(),
        );
        face.use_keyring(keyring, config.kms.when_lost);
        for running in old {
            running.stop().await;
        }
        Self { tokens }
    }

    /// Stops every token.
    pub(super) async fn stop(self) {
        for running in self.tokens {
            running.stop().await;
        }
    }
}

impl Running {
    fn start(settings: hsm_config::Token, state_dirs: &[PathBuf], face: &Arc<Face>) -> Self {
        let pin = pin::Reader(settings.pin.source.clone());
        let mut client = settings.to_client(state_dirs, Arc::new(pin));
        if client.launch.program.as_os_str().is_empty() {
            client.launch.program = beside_us("hsm-token");
        }
        let token = Token::start(client);
        let mut state = token.state();
        let face = Arc::clone(face);
        let watcher = tokio::spawn(async move {
            while state.changed().await.is_ok() {
                face.tokens_changed();
            }
        });
        let named = NamedToken {
            name: settings.name.clone(),
            uri: settings.uri.clone(),
            token,
        };
        Self {
            settings,
            state_dirs: state_dirs.to_vec(),
            named,
            watcher,
        }
    }

    async fn stop(self) {
        self.watcher.abort();
        self.named.token.stop().await;
    }
}

/// The program that is installed beside hsmd.
fn beside_us(name: &str) -> PathBuf {
    std::env::current_exe()
        .ok()
        .as_deref()
        .and_then(Path::parent)
        .unwrap_or(Path::new("/"))
        .join(name)
}
