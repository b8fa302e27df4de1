//! What can go wrong behind the PKCS#11 boundary, and what may be done about it.
//!
//! The module host turns every `CKR_*` into a [`Fault`]; the daemon decides by [`FaultKind`], never
//! by the code: which codes mean what differs by vendor, and that knowledge lives in the host.

use std::fmt;

/// What happened, in the terms of the one who must act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FaultKind {
    /// The module could not be loaded: absent, wrong architecture, missing library.
    ModuleLoad = 1,
    /// `C_Initialize` failed.
    Initialize = 2,
    /// No token matches the URI.
    TokenNotFound = 3,
    /// More than one token matches the URI.
    TokenAmbiguous = 4,
    /// The token wants a login and no PIN was given.
    PinMissing = 5,
    /// The token refused the PIN. Latches: never tried again with this `pin.generation`.
    PinIncorrect = 6,
    /// A PIN of this generation was refused before; no login was tried.
    PinLatched = 7,
    /// The token says the PIN is locked; no login was tried.
    PinLocked = 8,
    /// The token says one wrong try would lock the PIN; no login was tried.
    PinFinalTry = 9,
    /// The token says somebody's PIN was refused before; no login was tried with this generation.
    PinCountLow = 10,
    /// `C_Login` failed for another reason than the PIN.
    Login = 11,
    /// No key matches the search.
    KeyNotFound = 12,
    /// More than one key matches the search.
    KeyAmbiguous = 13,
    /// A key matches, but it is another one than before.
    KeyChanged = 14,
    /// The key's attributes or the mechanism forbid the operation.
    Refused = 15,
    /// The sealed bytes do not authenticate under this key and AAD.
    Tampered = 16,
    /// The device, session or library failed and the host's own ladder did not help.
    Device = 17,
    /// The request makes no sense to this host.
    BadRequest = 18,
    /// The host could not isolate itself as it was told to; the module was not loaded.
    Isolation = 19,
}

impl FaultKind {
    /// From its number.
    pub fn from_u8(n: u8) -> Option<Self> {
        use FaultKind::*;
        const ALL: [FaultKind; 19] = [
            ModuleLoad,
            Initialize,
            TokenNotFound,
            TokenAmbiguous,
            PinMissing,
            PinIncorrect,
            PinLatched,
            PinLocked,
            PinFinalTry,
            PinCountLow,
            Login,
            KeyNotFound,
            KeyAmbiguous,
            KeyChanged,
            Refused,
            Tampered,
            Device,
            BadRequest,
            Isolation,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == n)
    }

    /// The token cannot be used until something changes outside: the host is of no more use.
    pub fn is_token_lost(self) -> bool {
        use FaultKind::*;
        matches!(
            self,
            ModuleLoad | Initialize | TokenNotFound | TokenAmbiguous | Login | Device | Isolation
        )
    }

    /// Only a person (a new PIN, a raised generation) helps; trying again could lock the token.
    pub fn is_latched(self) -> bool {
        use FaultKind::*;
        matches!(
            self,
            PinMissing | PinIncorrect | PinLatched | PinLocked | PinFinalTry | PinCountLow
        )
    }
}

/// Longest text of a fault's detail, in bytes; longer ones are cut.
pub const MAX_DETAIL_LEN: usize = 512;

/// One failure, as the host reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What happened.
    pub kind: FaultKind,
    /// The `CKR_*` value behind it, 0 if there is none.
    pub ckr: u64,
    /// The PKCS#11 function that gave it, or what the host was doing. ASCII.
    pub function: String,
    /// The thing it happened to, and what was expected.
    pub detail: String,
    /// Serial number of the token concerned, without padding; empty when the host did not get so
    /// far. A PIN fault is noted under it: restarts and a renamed token must not lock the PIN.
    pub serial: String,
}

impl Fault {
    /// A fault without a `CKR_*` value.
    pub fn new(kind: FaultKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            ckr: 0,
            function: String::new(),
            detail: detail.into(),
            serial: String::new(),
        }
    }

    /// The same fault, said of the token with this serial number.
    #[must_use]
    pub fn on_token(mut self, serial: impl Into<String>) -> Self {
        self.serial = serial.into();
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)?;
        if !self.function.is_empty() {
            write!(f, " ({}", self.function)?;
            if self.ckr != 0 {
                write!(f, ": {}", ckr_name(self.ckr))?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}

/// The name of a `CKR_*` value (PKCS#11 3.2 §4, those that tokens are seen to give), else its
/// number in hex.
pub fn ckr_name(ckr: u64) -> String {
    let name = match ckr {
        0x00 => "CKR_OK",
        0x01 => "CKR_CANCEL",
        0x02 => "CKR_HOST_MEMORY",
        0x03 => "CKR_SLOT_ID_INVALID",
        0x05 => "CKR_GENERAL_ERROR",
        0x06 => "CKR_FUNCTION_FAILED",
        0x07 => "CKR_ARGUMENTS_BAD",
        0x0a => "CKR_CANT_LOCK",
        0x10 => "CKR_ATTRIBUTE_READ_ONLY",
        0x11 => "CKR_ATTRIBUTE_SENSITIVE",
        0x12 => "CKR_ATTRIBUTE_TYPE_INVALID",
        0x13 => "CKR_ATTRIBUTE_VALUE_INVALID",
        0x20 => "CKR_DATA_INVALID",
        0x21 => "CKR_DATA_LEN_RANGE",
        0x30 => "CKR_DEVICE_ERROR",
        0x31 => "CKR_DEVICE_MEMORY",
        0x32 => "CKR_DEVICE_REMOVED",
        0x40 => "CKR_ENCRYPTED_DATA_INVALID",
        0x41 => "CKR_ENCRYPTED_DATA_LEN_RANGE",
        0x42 => "CKR_AEAD_DECRYPT_FAILED",
        0x50 => "CKR_FUNCTION_CANCELED",
        0x54 => "CKR_FUNCTION_NOT_SUPPORTED",
        0x60 => "CKR_KEY_HANDLE_INVALID",
        0x62 => "CKR_KEY_SIZE_RANGE",
        0x63 => "CKR_KEY_TYPE_INCONSISTENT",
        0x68 => "CKR_KEY_FUNCTION_NOT_PERMITTED",
        0x70 => "CKR_MECHANISM_INVALID",
        0x71 => "CKR_MECHANISM_PARAM_INVALID",
        0x82 => "CKR_OBJECT_HANDLE_INVALID",
        0x90 => "CKR_OPERATION_ACTIVE",
        0x91 => "CKR_OPERATION_NOT_INITIALIZED",
        0xa0 => "CKR_PIN_INCORRECT",
        0xa1 => "CKR_PIN_INVALID",
        0xa2 => "CKR_PIN_LEN_RANGE",
        0xa3 => "CKR_PIN_EXPIRED",
        0xa4 => "CKR_PIN_LOCKED",
        0xb0 => "CKR_SESSION_CLOSED",
        0xb1 => "CKR_SESSION_COUNT",
        0xb3 => "CKR_SESSION_HANDLE_INVALID",
        0xe0 => "CKR_TOKEN_NOT_PRESENT",
        0xe1 => "CKR_TOKEN_NOT_RECOGNIZED",
        0x100 => "CKR_USER_ALREADY_LOGGED_IN",
        0x101 => "CKR_USER_NOT_LOGGED_IN",
        0x102 => "CKR_USER_PIN_NOT_INITIALIZED",
        0x103 => "CKR_USER_TYPE_INVALID",
        0x104 => "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
        0x105 => "CKR_USER_TOO_MANY_TYPES",
        0x150 => "CKR_BUFFER_TOO_SMALL",
        0x190 => "CKR_CRYPTOKI_NOT_INITIALIZED",
        0x191 => "CKR_CRYPTOKI_ALREADY_INITIALIZED",
        _ => return format!("CKR 0x{ckr:x}"),
    };
    name.to_owned()
}
