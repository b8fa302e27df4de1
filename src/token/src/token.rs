//! The token behind the module, as all session threads share it: slot, login, known keys, and the
//! uppermost rung of the recovery ladder.
//!
//! *Guarantees.* One login at a time. A refused PIN is never sent again. Re-initialisation happens
//! while no other thread is inside the module, at most once a second, and once for all threads that
//! failed together: they carry the generation they failed in.
//!
//! *Assumptions.* A thread that may call the module holds what [`Token::enter`] gave it. A thread
//! that is stuck inside the module therefore blocks re-initialisation: the wait for it is bounded,
//! the request then fails, and the daemon ends this process, which is the next rung.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

use cryptoki_sys::*;
use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{KeyRef, Open, TokenInfo};
use hsm_wire::identity::Fingerprint;
use hsm_wire::uri::Uri;

use crate::failure::{CallError, Failure};
use crate::login::Login;
use crate::module::{Module, Threading};
use crate::pin::LockedPin;
use crate::selftest::Choice;

/// How long re-initialisation waits for other threads to leave the module. A call that is not stuck
/// takes milliseconds; the daemon's own limit for a call (2 s by default) must not pass meanwhile.
const GATE_WAIT: Duration = Duration::from_millis(500);
/// Least time between two re-initialisations.
const REST: Duration = Duration::from_secs(1);

/// Module, token and login.
pub(crate) struct Token {
    /// The vendor's module.
    pub(crate) module: Module,
    /// How many threads may call it.
    pub(crate) threading: Threading,
    uri: Uri,
    gate: RwLock<Live>,
    waiting_writers: AtomicU32,
    login: Mutex<Login>,
    keys: Mutex<Keys>,
    wraps: Mutex<HashMap<Fingerprint, Choice>>,
    spare_seat: Mutex<()>,
}

/// What a re-initialisation replaces.
pub(crate) struct Live {
    /// Raised by every re-initialisation: sessions and handles of a lower one are void.
    pub(crate) generation: u64,
    /// The token's slot; None when the last re-initialisation found no token.
    pub(crate) slot: Option<CK_SLOT_ID>,
    /// The token.
    pub(crate) info: TokenInfo,
    initialized: Instant,
}

#[derive(Default)]
struct Keys {
    handles: HashMap<KeyRef, CK_OBJECT_HANDLE>,
    seen: HashSet<KeyRef>,
}

/// What became of an attempt to re-initialise.
pub(crate) enum Reinitialized {
    /// Done, by this thread.
    Now,
    /// Another thread did it since the failure.
    Meanwhile,
    /// Not tried: the last one was less than a second ago.
    TooSoon,
    /// Not tried: a thread is stuck in the module.
    Stuck,
}

impl Token {
    /// Loads the module, finds the token and logs in.
    pub(crate) fn open(open: Open) -> Result<Self, Fault> {
        let uri = Uri::parse(&open.token).map_err(|error| {
            Fault::new(
                FaultKind::BadRequest,
                format!("the token's URI `{}` cannot be used: {error}", open.token),
            )
        })?;
        if uri.names_object() {
            return Err(Fault::new(
                FaultKind::BadRequest,
                format!("the URI `{uri}` names an object, not only a token"),
            ));
        }
        let pin = open
            .pin
            .as_ref()
            .map(|pin| LockedPin::new(pin.expose()))
            .transpose()
            .map_err(|error| {
                Fault::new(
                    FaultKind::Device,
                    format!("no memory can be had for the PIN: {error}"),
                )
            })?;
        drop(open.pin);
        let module = Module::load(Path::new(&open.module))?;
        let threading = module.initialize().map_err(initialize_fault)?;
        let mut login = Login::new(pin, open.pin_generation, open.latched);
        let (slot, info) = login.connect(&module, &uri)?;
        Ok(Self {
            module,
            threading,
            uri,
            gate: RwLock::new(Live {
                generation: 1,
                slot: Some(slot),
                info,
                initialized: Instant::now(),
            }),
            waiting_writers: AtomicU32::new(0),
            login: Mutex::new(login),
            keys: Mutex::default(),
            wraps: Mutex::default(),
            spare_seat: Mutex::new(()),
        })
    }

    /// Leave to call the module, until the guard is dropped.
    pub(crate) fn enter(&self) -> RwLockReadGuard<'_, Live> {
        // A reader that came in while a writer waits would make it wait for ever.
        while self.waiting_writers.load(Ordering::Acquire) > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leave to call the module alone, or None when another thread does not come out in time.
    pub(crate) fn enter_alone(&self, wait: Duration) -> Option<RwLockWriteGuard<'_, Live>> {
        let deadline = Instant::now() + wait;
        self.waiting_writers.fetch_add(1, Ordering::AcqRel);
        let guard = loop {
            if let Ok(guard) = self.gate.try_write() {
                break Some(guard);
            }
            if Instant::now() >= deadline {
                break None;
            }
            thread::sleep(Duration::from_millis(1));
        };
        self.waiting_writers.fetch_sub(1, Ordering::AcqRel);
        guard
    }

    /// See [`Login::again`]. The caller is inside (see [`Token::enter`]).
    pub(crate) fn log_in_again(
        &self,
        live: &Live,
        session: CK_SESSION_HANDLE,
        force: bool,
    ) -> Result<bool, Failure> {
        let slot = live.slot.ok_or(Failure::NoToken)?;
        lock(&self.login).again(&self.module, slot, &live.info, session, force)
    }

    /// `C_Finalize`, `C_Initialize`, find the token, log in: on behalf of a thread that failed in
    /// `generation` and is not inside any more.
    pub(crate) fn reinitialize(&self, generation: u64) -> Result<Reinitialized, Fault> {
        let Some(mut live) = self.enter_alone(GATE_WAIT) else {
            log!("cannot re-initialise the module: another call is stuck inside it");
            return Ok(Reinitialized::Stuck);
        };
        if live.generation != generation {
            return Ok(Reinitialized::Meanwhile);
        }
        if live.initialized.elapsed() < REST {
            return Ok(Reinitialized::TooSoon);
        }
        log!("re-initialising the module");
        live.initialized = Instant::now();
        live.generation += 1;
        live.slot = None;
        lock(&self.keys).handles.clear();
        let mut login = lock(&self.login);
        login.forget_sessions();
        match self.module.finalize() {
            Ok(()) => {}
            Err(error) if error.code == CKR_CRYPTOKI_NOT_INITIALIZED => {}
            Err(error) => {
                return Err(error.fault(
                    FaultKind::Device,
                    "the module cannot be shut down".to_owned(),
                ));
            }
        }
        let found = self
            .module
            .initialize()
            .map_err(initialize_fault)
            .and_then(|_| login.connect(&self.module, &self.uri));
        match found {
            Ok((slot, info)) => {
                live.slot = Some(slot);
                live.info = info;
                Ok(Reinitialized::Now)
            }
            Err(fault) if fault.kind.is_latched() => Err(fault),
            Err(fault) => Err(Fault {
                kind: FaultKind::Device,
                detail: format!("the token is lost: {}", fault.detail),
                ..fault
            }),
        }
    }

    /// Ends the module's use: on the way out, if no thread is inside.
    pub(crate) fn shut_down(&self, wait: Duration) {
        if let Some(mut live) = self.enter_alone(wait) {
            live.slot = None;
            live.generation += 1;
            let _ = self.module.finalize();
        }
    }

    /// Must a session be logged in?
    pub(crate) fn has_pin(&self) -> bool {
        lock(&self.login).has_pin()
    }

    /// The keeper, and the right to run operations on it: for when the token grants no session more.
    pub(crate) fn spare_session(&self) -> Option<(CK_SESSION_HANDLE, MutexGuard<'_, ()>)> {
        let seat = lock(&self.spare_seat);
        let keeper = lock(&self.login).keeper()?;
        Some((keeper, seat))
    }

    /// The handle another thread found for this key.
    pub(crate) fn known_handle(&self, key: &KeyRef) -> Option<CK_OBJECT_HANDLE> {
        lock(&self.keys).handles.get(key).copied()
    }

    /// Notes a key that was found and whose fingerprint is right.
    pub(crate) fn note_handle(&self, key: &KeyRef, handle: CK_OBJECT_HANDLE) {
        let mut keys = lock(&self.keys);
        keys.handles.insert(key.clone(), handle);
        if !keys.seen.contains(key) {
            keys.seen.insert(key.clone());
        }
    }

    /// Forgets a handle that turned out bad, unless somebody has found a better one.
    pub(crate) fn forget_handle(&self, key: &KeyRef, handle: CK_OBJECT_HANDLE) {
        let mut keys = lock(&self.keys);
        if keys.handles.get(key) == Some(&handle) {
            keys.handles.remove(key);
        }
    }

    /// Was it there at any time since this process started?
    pub(crate) fn has_seen(&self, key: &KeyRef) -> bool {
        lock(&self.keys).seen.contains(key)
    }

    /// The self-test's result for a key, if it was run.
    pub(crate) fn known_choice(&self, fingerprint: &Fingerprint) -> Option<Choice> {
        lock(&self.wraps).get(fingerprint).cloned()
    }

    /// Notes a self-test's result.
    pub(crate) fn note_choice(&self, fingerprint: Fingerprint, choice: Choice) {
        lock(&self.wraps).insert(fingerprint, choice);
    }
}

fn initialize_fault(error: CallError) -> Fault {
    error.fault(FaultKind::Initialize, "the module cannot be initialised")
}

/// A panic ends the process (see `main`), so no lock is ever left poisoned; this says it to the type.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
