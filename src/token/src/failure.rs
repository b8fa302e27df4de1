//! What went wrong in a PKCS#11 call, and which rung of the recovery ladder may help.
//!
//! The mapping is the one place that knows what codes mean in practice, across vendors: the
//! specification says little about which of them a network HSM gives when its link drops.

use cryptoki_sys::*;
use hsm_wire::fault::{Fault, FaultKind};

/// A function of the module returned something else than `CKR_OK`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallError {
    /// The C function.
    pub(crate) function: &'static str,
    /// What it returned.
    pub(crate) code: CK_RV,
}

/// Why an operation did not work.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    /// A call failed.
    Call(CallError),
    /// A key that was there is not found any more: the token behind the module is another, or gone.
    KeyLost(String),
    /// An earlier re-initialisation left no token to work with.
    NoToken,
    /// The module broke PKCS#11 itself: a length beyond its buffer, a count beyond its array. What
    /// else it wrote is unknown: nothing is tried again in this process, and the daemon ends it.
    Broken {
        /// The C function.
        function: &'static str,
        /// What it claimed.
        detail: String,
    },
    /// Settled: no rung of the ladder changes it.
    Final(Fault),
}

/// The rungs, lowest first. Each is climbed at most once per request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rung {
    /// Search for the key again on the same session.
    Find,
    /// Open a new session, log in if the token has forgotten us.
    Session,
    /// `C_Finalize`, `C_Initialize`, find the slot, log in.
    Reinitialize,
}

impl CallError {
    /// Ok for `CKR_OK`.
    pub(crate) fn check(function: &'static str, code: CK_RV) -> Result<(), Self> {
        match code {
            CKR_OK => Ok(()),
            code => Err(Self { function, code }),
        }
    }

    /// As a fault of `kind`.
    pub(crate) fn fault(self, kind: FaultKind, detail: impl Into<String>) -> Fault {
        Fault {
            ckr: self.code,
            function: self.function.to_owned(),
            ..Fault::new(kind, detail)
        }
    }

    /// The key or the mechanism does not allow it. Trying again cannot help.
    pub(crate) fn is_refusal(self) -> bool {
        matches!(
            self.code,
            CKR_KEY_FUNCTION_NOT_PERMITTED
                | CKR_KEY_TYPE_INCONSISTENT
                | CKR_KEY_SIZE_RANGE
                | CKR_MECHANISM_INVALID
                | CKR_MECHANISM_PARAM_INVALID
                | CKR_FUNCTION_NOT_SUPPORTED
                | CKR_ACTION_PROHIBITED
        )
    }

    /// `C_Decrypt` may mean by it that the data does not authenticate.
    ///
    /// PKCS#11 before 3.0 had no code for that, so modules give what they like (SoftHSM 2.6:
    /// `CKR_GENERAL_ERROR`). Those that name session, login, handle or token are not among them.
    pub(crate) fn may_mean_tampered(self) -> bool {
        self.rung() == Some(Rung::Session) && !self.names_the_session()
    }

    fn names_the_session(self) -> bool {
        matches!(
            self.code,
            CKR_SESSION_CLOSED
                | CKR_SESSION_HANDLE_INVALID
                | CKR_SESSION_COUNT
                | CKR_OPERATION_ACTIVE
                | CKR_OPERATION_NOT_INITIALIZED
                | CKR_USER_NOT_LOGGED_IN
        )
    }

    /// The lowest rung that can mend it.
    pub(crate) fn rung(self) -> Option<Rung> {
        match self.code {
            _ if self.is_refusal() => None,
            CKR_KEY_HANDLE_INVALID | CKR_OBJECT_HANDLE_INVALID => Some(Rung::Find),
            // The slot list and what is in a slot may change only at C_Initialize (PKCS#11 2.40
            // §5.5, C_GetSlotList), so a new session on the same slot is no cure.
            CKR_DEVICE_REMOVED
            | CKR_TOKEN_NOT_PRESENT
            | CKR_TOKEN_NOT_RECOGNIZED
            | CKR_SLOT_ID_INVALID
            | CKR_CRYPTOKI_NOT_INITIALIZED => Some(Rung::Reinitialize),
            _ => Some(Rung::Session),
        }
    }
}

impl Failure {
    /// A settled fault without a `CKR_*` value.
    pub(crate) fn settled(kind: FaultKind, detail: impl Into<String>) -> Self {
        Self::Final(Fault::new(kind, detail))
    }

    /// The lowest rung that can mend it.
    pub(crate) fn rung(&self) -> Option<Rung> {
        match self {
            Self::Call(error) => error.rung(),
            Self::KeyLost(_) => Some(Rung::Session),
            Self::NoToken => Some(Rung::Reinitialize),
            Self::Broken { .. } | Self::Final(_) => None,
        }
    }

    /// A failure that names neither session nor token may be one key's own: an HSM gives
    /// CKR_DEVICE_ERROR for a key in a state it does not like.
    pub(crate) fn tells_of_one_key(&self) -> bool {
        match self {
            Self::Call(error) => error.is_refusal() || error.may_mean_tampered(),
            Self::Final(_) => true,
            _ => false,
        }
    }

    /// The token has forgotten that we are logged in.
    pub(crate) fn is_login_lost(&self) -> bool {
        matches!(self, Self::Call(error) if error.code == CKR_USER_NOT_LOGGED_IN)
    }

    /// What the daemon is told when the ladder has ended. `doing` names the operation.
    pub(crate) fn into_fault(self, doing: &str) -> Fault {
        match self {
            Self::Final(fault) => fault,
            Self::Call(error) if error.is_refusal() => error.fault(
                FaultKind::Refused,
                format!("the token does not allow to {doing}"),
            ),
            Self::Call(error) => {
                error.fault(FaultKind::Device, format!("the token failed to {doing}"))
            }
            Self::KeyLost(key) => Fault::new(
                FaultKind::Device,
                format!("the token has lost {key}, which was there before"),
            ),
            Self::NoToken => Fault::new(
                FaultKind::Device,
                "the token was lost and has not come back".to_owned(),
            ),
            Self::Broken { function, detail } => Fault {
                function: function.to_owned(),
                ..Fault::new(
                    FaultKind::Device,
                    format!("the module broke PKCS#11: {detail}"),
                )
            },
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(code: CK_RV) -> CallError {
        CallError {
            function: "C_Decrypt",
            code,
        }
    }

    #[test]
    fn a_lost_handle_asks_only_for_another_search() {
        assert_eq!(call(CKR_KEY_HANDLE_INVALID).rung(), Some(Rung::Find));
    }

    #[test]
    fn a_removed_token_skips_the_rungs_that_cannot_help() {
        assert_eq!(call(CKR_TOKEN_NOT_PRESENT).rung(), Some(Rung::Reinitialize));
    }

    #[test]
    fn a_refusal_is_settled() {
        assert_eq!(call(CKR_KEY_FUNCTION_NOT_PERMITTED).rung(), None);
        let fault = Failure::from(call(CKR_KEY_FUNCTION_NOT_PERMITTED)).into_fault("unseal");
        assert_eq!(fault.kind, FaultKind::Refused);
    }

    #[test]
    fn only_codes_that_name_nothing_else_may_mean_tampered() {
        assert!(call(CKR_GENERAL_ERROR).may_mean_tampered());
        assert!(call(CKR_ENCRYPTED_DATA_INVALID).may_mean_tampered());
        assert!(call(CKR_AEAD_DECRYPT_FAILED).may_mean_tampered());
        assert!(!call(CKR_SESSION_HANDLE_INVALID).may_mean_tampered());
        assert!(!call(CKR_KEY_HANDLE_INVALID).may_mean_tampered());
        assert!(!call(CKR_DEVICE_REMOVED).may_mean_tampered());
        assert!(!call(CKR_MECHANISM_INVALID).may_mean_tampered());
    }

    #[test]
    fn a_vendor_code_climbs_from_the_session() {
        assert_eq!(call(0x8000_0123).rung(), Some(Rung::Session));
    }
}
