//! The token behind the module, as all session threads share it: slot, login, known keys, and the
//! upper two rungs of the recovery ladder.
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
use hsm_wire::envelope::Wrap;
use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{KeyRef, LatchNote, Open, TokenInfo};
use hsm_wire::identity::Fingerprint;
use hsm_wire::uri::Uri;

use crate::failure::{CallError, Failure};
use crate::latch;
use crate::module::{Module, Threading};
use crate::pin::LockedPin;

/// How long re-initialisation waits for other threads to leave the module. A call that is not stuck
/// takes milliseconds; the daemon's own limit for a call (2 s by default) must not pass meanwhile.
const GATE_WAIT: Duration = Duration::from_millis(500);
/// Least time between two re-initialisations, and between two logins after the first.
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
    wraps: Mutex<HashMap<Fingerprint, Result<Wrap, String>>>,
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

struct Login {
    pin: Option<LockedPin>,
    generation: u32,
    notes: Vec<LatchNote>,
    /// Set by the first refusal, for ever.
    refused: Option<Fault>,
    last: Option<Instant>,
    /// A session that does nothing but stay open: a token logs out with its last session.
    keeper: Option<CK_SESSION_HANDLE>,
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
        let mut login = Login {
            pin,
            generation: open.pin_generation,
            notes: open.latched,
            refused: None,
            last: None,
            keeper: None,
        };
        let (slot, info) = connect(&module, &uri, &mut login)?;
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

    /// Logs in again if `session` shows that the token has forgotten us, or if `force`d because it
    /// says so itself. True when a login was done. The caller is inside (see [`Token::enter`]).
    pub(crate) fn log_in_again(
        &self,
        live: &Live,
        session: CK_SESSION_HANDLE,
        force: bool,
    ) -> Result<bool, Failure> {
        let slot = live.slot.ok_or(Failure::NoToken)?;
        let mut login = lock(&self.login);
        if login.pin.is_none() {
            return if force {
                Err(Failure::settled(FaultKind::PinMissing, NO_PIN))
            } else {
                Ok(false)
            };
        }
        // Another thread may have done it while this one waited for the lock.
        if !force && !is_public(self.module.session_state(session)?) {
            return Ok(false);
        }
        if login.last.is_some_and(|last| last.elapsed() < REST) {
            return Ok(false);
        }
        let keeper = login.keeper.take();
        login.keeper = match keeper {
            Some(keeper) if self.module.session_state(keeper).is_ok() => Some(keeper),
            _ => self.module.open_session(slot).ok(),
        };
        eprintln!("hsm-token: the token has forgotten the login; logging in again");
        log_in(&self.module, slot, session, &live.info, &mut login)
            .map(|()| true)
            .map_err(Failure::Final)
    }

    /// `C_Finalize`, `C_Initialize`, find the token, log in: on behalf of a thread that failed in
    /// `generation` and is not inside any more.
    pub(crate) fn reinitialize(&self, generation: u64) -> Result<Reinitialized, Fault> {
        let Some(mut live) = self.enter_alone(GATE_WAIT) else {
            eprintln!(
                "hsm-token: cannot re-initialise the module: another call is stuck inside it"
            );
            return Ok(Reinitialized::Stuck);
        };
        if live.generation != generation {
            return Ok(Reinitialized::Meanwhile);
        }
        if live.initialized.elapsed() < REST {
            return Ok(Reinitialized::TooSoon);
        }
        eprintln!("hsm-token: re-initialising the module");
        live.initialized = Instant::now();
        live.generation += 1;
        live.slot = None;
        lock(&self.keys).handles.clear();
        let mut login = lock(&self.login);
        login.keeper = None;
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
            .and_then(|_| connect(&self.module, &self.uri, &mut login));
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
        lock(&self.login).pin.is_some()
    }

    /// The keeper, and the right to run operations on it: for when the token grants no session more.
    pub(crate) fn spare_session(&self) -> Option<(CK_SESSION_HANDLE, MutexGuard<'_, ()>)> {
        let seat = lock(&self.spare_seat);
        let keeper = lock(&self.login).keeper?;
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
    pub(crate) fn known_wrap(&self, fingerprint: &Fingerprint) -> Option<Result<Wrap, String>> {
        lock(&self.wraps).get(fingerprint).cloned()
    }

    /// Notes a self-test's result.
    pub(crate) fn note_wrap(&self, fingerprint: Fingerprint, wrap: Result<Wrap, String>) {
        lock(&self.wraps).insert(fingerprint, wrap);
    }
}

const NO_PIN: &str = "the token wants a login and no PIN is configured; give pin.file, pin.fd or \
                      pin.credential";

/// Finds the slot by the token's URI, opens the keeper, logs in.
fn connect(
    module: &Module,
    uri: &Uri,
    login: &mut Login,
) -> Result<(CK_SLOT_ID, TokenInfo), Fault> {
    let (slot, info, flags) = find_slot(module, uri)?;
    let keeper = module.open_session(slot).map_err(|error| {
        error
            .fault(
                FaultKind::Device,
                format!("no session can be opened on the token `{}`", info.label),
            )
            .on_token(&info.serial)
    })?;
    login.keeper = Some(keeper);
    if login.pin.is_some() {
        log_in(module, slot, keeper, &info, login)?;
    } else if flags & CKF_LOGIN_REQUIRED != 0 {
        return Err(Fault::new(FaultKind::PinMissing, NO_PIN).on_token(&info.serial));
    }
    Ok((slot, info))
}

fn find_slot(module: &Module, uri: &Uri) -> Result<(CK_SLOT_ID, TokenInfo, CK_FLAGS), Fault> {
    let slots = module.slots_with_token().map_err(|failure| Fault {
        kind: FaultKind::TokenNotFound,
        ..failure.into_fault("list its slots")
    })?;
    let mut labels = Vec::new();
    let mut matching = Vec::new();
    for slot in slots {
        // A slot whose token cannot be read is another token's trouble, not ours.
        let Ok(raw) = module.token_info(slot) else {
            continue;
        };
        if raw.flags & CKF_TOKEN_INITIALIZED == 0 {
            continue;
        }
        let info = read_token_info(&raw);
        if uri.matches_token(&info, Some(slot)) {
            matching.push((slot, info, raw.flags));
        } else {
            labels.push(format!("`{}`", info.label));
        }
    }
    match matching.len() {
        1 => Ok(matching.remove(0)),
        0 => Err(Fault::new(
            FaultKind::TokenNotFound,
            if labels.is_empty() {
                format!("no token matches `{uri}`: the module shows no token at all")
            } else {
                format!(
                    "no token matches `{uri}`; the module shows {}",
                    labels.join(", ")
                )
            },
        )),
        n => Err(Fault::new(
            FaultKind::TokenAmbiguous,
            format!(
                "{n} tokens match `{uri}`: {}; add `serial=` to the URI",
                matching
                    .iter()
                    .map(|(_, info, _)| format!("`{}` (serial {})", info.label, info.serial))
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        )),
    }
}

/// One login, unless the latch forbids it. A fault names the token by its serial number.
fn log_in(
    module: &Module,
    slot: CK_SLOT_ID,
    session: CK_SESSION_HANDLE,
    info: &TokenInfo,
    login: &mut Login,
) -> Result<(), Fault> {
    log_in_once(module, slot, session, info, login).map_err(|fault| fault.on_token(&info.serial))
}

fn log_in_once(
    module: &Module,
    slot: CK_SLOT_ID,
    session: CK_SESSION_HANDLE,
    info: &TokenInfo,
    login: &mut Login,
) -> Result<(), Fault> {
    if let Some(refused) = &login.refused {
        return Err(Fault {
            kind: FaultKind::PinLatched,
            ..refused.clone()
        });
    }
    let Some(pin) = &mut login.pin else {
        return Err(Fault::new(FaultKind::PinMissing, NO_PIN));
    };
    // Asked anew each time: another node may have brought the counter down since.
    let raw = module.token_info(slot).map_err(|error| {
        error.fault(
            FaultKind::Login,
            format!(
                "the PIN flags of the token `{}` cannot be read, so no login is tried",
                info.label
            ),
        )
    })?;
    latch::may_log_in(raw.flags, &info.serial, login.generation, &login.notes)?;
    login.last = Some(Instant::now());
    match module.login(session, pin.bytes_mut()) {
        Ok(()) => Ok(()),
        Err(error) if error.code == CKR_USER_ALREADY_LOGGED_IN => Ok(()),
        Err(error) => {
            let fault = latch::refused(error, &info.serial, login.generation);
            if fault.kind.is_latched() {
                login.refused = Some(fault.clone());
            }
            Err(fault)
        }
    }
}

fn initialize_fault(error: CallError) -> Fault {
    error.fault(FaultKind::Initialize, "the module cannot be initialised")
}

/// A session in a public state is not logged in.
pub(crate) fn is_public(state: CK_STATE) -> bool {
    matches!(state, CKS_RO_PUBLIC_SESSION | CKS_RW_PUBLIC_SESSION)
}

/// `CK_TOKEN_INFO` as text. Fields are padded with blanks (PKCS#11 2.40 §3.2), by some with zeros.
fn read_token_info(raw: &CK_TOKEN_INFO) -> TokenInfo {
    let text = |field: &[u8]| {
        String::from_utf8_lossy(field)
            .trim_end_matches([' ', '\0'])
            .to_owned()
    };
    TokenInfo {
        label: text(&raw.label),
        serial: text(&raw.serialNumber),
        manufacturer: text(&raw.manufacturerID),
        model: text(&raw.model),
    }
}

/// A panic ends the process (see `main`), so no lock is ever left poisoned; this says it to the type.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
