//! Finding the token's slot and logging in: at Open, after a re-initialisation, and when the token
//! has forgotten us.

use std::time::{Duration, Instant};

use cryptoki_sys::*;
use hsm_wire::fault::{Fault, FaultKind, ckr_name};
use hsm_wire::host::{LatchNote, TokenInfo};
use hsm_wire::uri::Uri;

use crate::failure::{CallError, Failure};
use crate::latch;
use crate::module::Module;
use crate::pin::LockedPin;

/// Least time between a login and the next one of the same token. A token that forgets it faster
/// needs more than a login.
const REST: Duration = Duration::from_secs(1);
const NO_PIN: &str = "the token wants a login and no PIN is configured; give pin.file, pin.fd or \
                      pin.credential";

/// The PIN, and what happened to it.
pub(crate) struct Login {
    pin: Option<LockedPin>,
    generation: u32,
    notes: Vec<LatchNote>,
    /// Set by the first refusal, for ever.
    refused: Option<Fault>,
    last: Option<Instant>,
    /// A session that does nothing but stay open: a token logs out with its last session.
    keeper: Option<CK_SESSION_HANDLE>,
}

impl Login {
    /// Nothing has happened yet.
    pub(crate) fn new(pin: Option<LockedPin>, generation: u32, notes: Vec<LatchNote>) -> Self {
        Self {
            pin,
            generation,
            notes,
            refused: None,
            last: None,
            keeper: None,
        }
    }

    /// Must a session be logged in?
    pub(crate) fn has_pin(&self) -> bool {
        self.pin.is_some()
    }

    /// The session that is kept open.
    pub(crate) fn keeper(&self) -> Option<CK_SESSION_HANDLE> {
        self.keeper
    }

    /// After `C_Finalize` no session is left.
    pub(crate) fn forget_sessions(&mut self) {
        self.keeper = None;
    }

    /// Finds the slot by the token's URI, opens the keeper, logs in.
    pub(crate) fn connect(
        &mut self,
        module: &Module,
        uri: &Uri,
    ) -> Result<(CK_SLOT_ID, TokenInfo), Fault> {
        let (slot, info, flags) = find_slot(module, uri)?;
        let keeper = module.open_session(slot).map_err(|error| {
            let detail = format!("no session can be opened on the token `{}`", info.label);
            error
                .fault(FaultKind::Device, detail)
                .on_token(&info.serial)
        })?;
        self.keeper = Some(keeper);
        if self.has_pin() {
            self.log_in(module, slot, keeper, &info)?;
        } else if flags & CKF_LOGIN_REQUIRED != 0 {
            return Err(Fault::new(FaultKind::PinMissing, NO_PIN).on_token(&info.serial));
        }
        Ok((slot, info))
    }

    /// Logs in again if `session` shows that the token has forgotten us, or if `force`d because it
    /// says so itself. True when a login was done.
    pub(crate) fn again(
        &mut self,
        module: &Module,
        slot: CK_SLOT_ID,
        info: &TokenInfo,
        session: CK_SESSION_HANDLE,
        force: bool,
    ) -> Result<bool, Failure> {
        if !self.has_pin() {
            return if force {
                Err(Failure::settled(FaultKind::PinMissing, NO_PIN))
            } else {
                Ok(false)
            };
        }
        // Another thread may have done it while this one waited for the lock.
        if !force && !is_public(module.session_state(session)?) {
            return Ok(false);
        }
        if self.last.is_some_and(|last| last.elapsed() < REST) {
            return Ok(false);
        }
        if self
            .keeper
            .is_none_or(|keeper| module.session_state(keeper).is_err())
        {
            self.keeper = module.open_session(slot).ok();
        }
        log!("the token has forgotten the login; logging in again");
        match self.log_in(module, slot, session, info) {
            Ok(()) => Ok(true),
            Err(fault) if fault.kind.is_latched() => Err(Failure::Final(fault)),
            // Not the PIN's fault: the next rung may help.
            Err(fault) => Err(Failure::Call(CallError {
                function: "C_Login",
                code: fault.ckr,
            })),
        }
    }

    /// One login, unless the latch forbids it. A fault names the token by its serial number.
    fn log_in(
        &mut self,
        module: &Module,
        slot: CK_SLOT_ID,
        session: CK_SESSION_HANDLE,
        info: &TokenInfo,
    ) -> Result<(), Fault> {
        self.log_in_once(module, slot, session, info)
            .map_err(|fault| fault.on_token(&info.serial))
    }

    fn log_in_once(
        &mut self,
        module: &Module,
        slot: CK_SLOT_ID,
        session: CK_SESSION_HANDLE,
        info: &TokenInfo,
    ) -> Result<(), Fault> {
        if let Some(refused) = &self.refused {
            return Err(Fault {
                kind: FaultKind::PinLatched,
                ..refused.clone()
            });
        }
        let Some(pin) = &mut self.pin else {
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
        latch::may_log_in(raw.flags, &info.serial, self.generation, &self.notes)?;
        self.last = Some(Instant::now());
        match module.login(session, pin.bytes_mut()) {
            Ok(()) => Ok(()),
            Err(error) if error.code == CKR_USER_ALREADY_LOGGED_IN => Ok(()),
            Err(error) => {
                let fault = latch::refused(error, &info.serial, self.generation);
                if fault.kind.is_latched() {
                    self.refused = Some(fault.clone());
                }
                Err(fault)
            }
        }
    }
}

fn find_slot(module: &Module, uri: &Uri) -> Result<(CK_SLOT_ID, TokenInfo, CK_FLAGS), Fault> {
    let slots = module.slots_with_token().map_err(|failure| Fault {
        kind: FaultKind::TokenNotFound,
        ..failure.into_fault("list its slots")
    })?;
    let mut others = Vec::new();
    let mut matching = Vec::new();
    for slot in slots {
        let raw = match module.token_info(slot) {
            Ok(raw) => raw,
            // Perhaps another token's trouble, perhaps ours: then it is said below.
            Err(error) => {
                others.push(format!("slot {slot} with {}", ckr_name(error.code)));
                continue;
            }
        };
        if raw.flags & CKF_TOKEN_INITIALIZED == 0 {
            continue;
        }
        let info = read_token_info(&raw);
        if uri.matches_token(&info, Some(slot)) {
            matching.push((slot, info, raw.flags));
        } else {
            others.push(format!("`{}`", info.label));
        }
    }
    match matching.len() {
        1 => Ok(matching.remove(0)),
        0 => Err(Fault::new(
            FaultKind::TokenNotFound,
            if others.is_empty() {
                format!("no token matches `{uri}`: the module shows no token at all")
            } else {
                format!(
                    "no token matches `{uri}`; the module shows {}",
                    others.join(", ")
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
