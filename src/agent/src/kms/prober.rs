//! The background probe: a real seal and unseal under the active key, so that Status has something
//! true to say without touching the HSM.
//!
//! kube-apiserver asks for Status some three times a minute, and every 3 to 10 s when something is
//! wrong; each API server's `/readyz` waits for the answer. A probe costs the HSM two operations.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Face;

/// Between probes while all is well. The API server believes a good answer for 20 s: a lost token
/// turns its /readyz red within 20 + 5 + a moment < 30 s.
const PERIOD_WELL: Duration = Duration::from_secs(5);
/// Between probes while something is wrong.
const PERIOD_ILL: Duration = Duration::from_secs(1);
/// A finding older than this proves nothing any more.
const MAX_AGE: Duration = Duration::from_secs(30);
/// A probe under way for longer than this is a hung HSM, whatever comes of it.
const MAX_IN_FLIGHT: Duration = Duration::from_secs(5);
/// When a probe is given up. Above [`MAX_IN_FLIGHT`], which is what turns health.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// Between looks for the active key on a token that does not (yet) hold it.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// The same for any other key that a rule names: a pending one is about to be made.
const LOOK_FOR_OTHERS: Duration = Duration::from_secs(30);

/// What the probes found.
#[derive(Default)]
pub(super) struct Pulse {
    last: Option<(Instant, Result<(), String>)>,
    in_flight_since: Option<Instant>,
}

impl Pulse {
    /// Healthy, or why not.
    pub(super) fn verdict(&self) -> Result<(), String> {
        if let Some(since) = self.in_flight_since
            && since.elapsed() > MAX_IN_FLIGHT
        {
            return Err(format!(
                "the HSM has not answered a probe for {} s",
                since.elapsed().as_secs()
            ));
        }
        match &self.last {
            None => Err("the first probe of the HSM has not ended yet".to_owned()),
            Some((at, Ok(()))) if at.elapsed() > MAX_AGE => Err(format!(
                "the last probe of the HSM that worked is {} s old",
                at.elapsed().as_secs()
            )),
            Some((_, outcome)) => outcome.clone(),
        }
    }
}

impl Face {
    /// The probe under way has ended.
    fn note(&self, outcome: Result<(), String>) {
        let mut pulse = self.pulse();
        // The keyring may have been replaced meanwhile; then this finding is about another one.
        if pulse.in_flight_since.take().is_some() {
            pulse.last = Some((Instant::now(), outcome));
        }
    }
}

/// Probes for as long as the process lives.
pub(crate) async fn run(face: Arc<Face>) {
    let mut looked = None;
    loop {
        let well = beat(&face, &mut looked).await;
        // Says so in the log when health changed, also when nobody asks.
        face.health();
        let period = if well { PERIOD_WELL } else { PERIOD_ILL };
        let _ = tokio::time::timeout(period, face.changed.notified()).await;
    }
}

async fn beat(face: &Face, looked: &mut Option<Instant>) -> bool {
    let Ok(keyring) = face.keyring() else {
        return false;
    };
    keyring.refresh();
    // The operator may make the key while we run: look again, now and then.
    let pause = match (keyring.active().is_err(), keyring.lacks_a_key()) {
        (true, _) => Some(LOOK_AGAIN),
        (false, true) => Some(LOOK_FOR_OTHERS),
        (false, false) => None,
    };
    if pause.is_some_and(|pause| looked.is_none_or(|at: Instant| at.elapsed() > pause)) {
        *looked = Some(Instant::now());
        keyring.look_again(Instant::now() + PROBE_TIMEOUT).await;
    }
    if keyring.active().is_err() {
        return false;
    }
    face.pulse().in_flight_since = Some(Instant::now());
    let outcome = keyring
        .probe(Instant::now() + PROBE_TIMEOUT)
        .await
        .map_err(|error| error.to_string());
    let well = outcome.is_ok();
    face.note(outcome);
    keyring.probe_standbys(Instant::now() + PROBE_TIMEOUT).await;
    well
}
