//! What a host may log in with: the PIN as it is now, and what is known of refused ones.
//!
//! *Guarantees.* A PIN is read for each host anew and kept by nobody here. Where it is not known
//! which PINs were refused, none is handed over. What is known reaches the host with the PIN: only
//! the host learns which token it has before it, and it is the host that does not log in.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{LatchNote, MAX_NAME_LEN};
use hsm_wire::secret::Secret;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use crate::config::{Config, PinSource};
use crate::latch::{Latch, LatchError, Note};
use crate::supervise::Failed;

/// Reading some small files takes milliseconds, unless a disk hangs.
const READ_WAIT: Duration = Duration::from_secs(10);

/// One token's PIN and notes.
pub(crate) struct Login {
    name: String,
    source: Option<Arc<dyn PinSource>>,
    generation: u32,
    /// Stands for the token where its serial number is not known.
    uri_key: String,
    /// Of the token that was opened last.
    serial: Option<String>,
    latch: Latch,
    /// A read that hangs: another beside it would only be another thread that hangs.
    reading: Option<JoinHandle<Prepared>>,
}

type Prepared = Result<(Option<Secret>, Vec<LatchNote>), Failed>;

impl Login {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            name: config.name.clone(),
            source: config.pin.clone(),
            generation: config.pin_generation,
            uri_key: format!("uri:{}", config.uri),
            serial: None,
            latch: Latch::new(&config.state_dirs),
            reading: None,
        }
    }

    /// The token that was opened has this serial number.
    pub(crate) fn token_is(&mut self, serial: String) {
        self.serial = Some(serial);
    }

    /// The PIN for the next host and the notes that go with it.
    pub(crate) async fn prepare(&mut self) -> Prepared {
        let Some(source) = self.source.clone() else {
            return Ok((None, Vec::new()));
        };
        let latch = self.latch.clone();
        let tokens = [Some(self.uri_key.clone()), self.serial.clone()];
        let generation = self.generation;
        let mut reading = self
            .reading
            .take()
            .unwrap_or_else(|| spawn_blocking(move || read(&latch, &tokens, generation, &*source)));
        match timeout(READ_WAIT, &mut reading).await {
            Ok(prepared) => prepared.unwrap_or_else(|e| Err(unreadable(e))),
            Err(_) => {
                self.reading = Some(reading);
                Err(unreadable(format!(
                    "PIN and state folders did not answer within {} s",
                    READ_WAIT.as_secs()
                )))
            }
        }
    }

    /// Notes that the PIN was refused, before anything else happens.
    pub(crate) async fn note(&self, fault: &Fault) {
        use FaultKind::{PinCountLow, PinFinalTry, PinIncorrect, PinLocked};
        let (PinIncorrect | PinCountLow | PinLocked | PinFinalTry) = fault.kind else {
            return;
        };
        let serial = Some(&fault.serial)
            .filter(|serial| !serial.is_empty())
            .or(self.serial.as_ref());
        let note = Note {
            token: serial.unwrap_or(&self.uri_key).clone(),
            generation: self.generation,
            reason: fault.to_string(),
            time: SystemTime::now(),
        };
        let latch = self.latch.clone();
        let failed = spawn_blocking(move || latch.write(&note)).await;
        let failed = failed.unwrap_or_default();
        if failed.len() == self.latch.folders() {
            tracing::error!(
                token = self.name,
                "That the PIN was refused is noted nowhere: a restarted daemon would try it again."
            );
        }
        for (folder, error) in failed {
            tracing::warn!(
                token = self.name,
                folder = %folder.display(),
                %error,
                "That the PIN was refused could not be noted here."
            );
        }
    }
}

fn read(
    latch: &Latch,
    tokens: &[Option<String>],
    generation: u32,
    source: &dyn PinSource,
) -> Prepared {
    let notes = latch.read().map_err(|e| Failed::Down(with_cause(&e)))?;
    let mut refused = tokens
        .iter()
        .flatten()
        .filter_map(|token| notes.get(token))
        .filter(|note| note.generation >= generation);
    if let Some(note) = refused.next() {
        return Err(Failed::Latched(format!(
            "a PIN of generation {} was refused before: {}",
            note.generation, note.reason
        )));
    }
    let pin = source.read().map_err(unreadable)?;
    let notes = notes
        .into_values()
        // What is longer is a URI, which was compared above; a serial number is never so long.
        .filter(|note| note.token.len() <= MAX_NAME_LEN)
        .map(|note| LatchNote {
            serial: note.token,
            generation: note.generation,
        })
        .collect();
    Ok((Some(pin), notes))
}

fn unreadable(why: impl std::fmt::Display) -> Failed {
    Failed::Down(format!("the PIN cannot be read: {why}"))
}

fn with_cause(error: &LatchError) -> String {
    use std::error::Error;
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
