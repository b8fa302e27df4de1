//! May we log in? A wrong PIN is tried once, by one node, and never again until a person has
//! raised `pin.generation`: tokens lock themselves after a few tries, and a locked HSM partition
//! takes every cluster down that shares it.
//!
//! Pure: what the token says of itself, what was noted before, and the generation at hand.

use cryptoki_sys::*;
use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::LatchNote;

use crate::failure::CallError;

/// Ok when a login cannot lock the token by repeating what was refused before.
pub(crate) fn may_log_in(
    flags: CK_FLAGS,
    serial: &str,
    generation: u32,
    notes: &[LatchNote],
) -> Result<(), Fault> {
    let noted = |wanted: fn(u32, u32) -> bool| {
        notes
            .iter()
            .any(|note| note.serial == serial && wanted(note.generation, generation))
    };
    if noted(|refused, now| refused >= now) {
        return Err(Fault::new(
            FaultKind::PinLatched,
            format!(
                "the token with serial number `{serial}` refused the PIN of generation {generation} \
                 before; correct the PIN and raise pin.generation"
            ),
        ));
    }
    if flags & CKF_USER_PIN_LOCKED != 0 {
        return Err(Fault::new(
            FaultKind::PinLocked,
            format!(
                "the token with serial number `{serial}` has locked the user PIN; its security \
                 officer must set it anew"
            ),
        ));
    }
    if flags & CKF_USER_PIN_FINAL_TRY != 0 {
        return Err(Fault::new(
            FaultKind::PinFinalTry,
            format!(
                "one more wrong PIN would lock the token with serial number `{serial}`; log in once \
                 by hand with the right PIN, which resets its counter"
            ),
        ));
    }
    if flags & CKF_USER_PIN_COUNT_LOW != 0 && !noted(|refused, now| refused < now) {
        return Err(Fault::new(
            FaultKind::PinCountLow,
            format!(
                "the token with serial number `{serial}` has seen a wrong PIN since the last login, \
                 not from here; log in once by hand with the right PIN, which resets its counter"
            ),
        ));
    }
    Ok(())
}

/// What a failed `C_Login` means.
pub(crate) fn refused(error: CallError, serial: &str, generation: u32) -> Fault {
    match error.code {
        CKR_PIN_LOCKED => error.fault(
            FaultKind::PinLocked,
            format!(
                "the token with serial number `{serial}` has locked the user PIN; its security \
                 officer must set it anew"
            ),
        ),
        CKR_PIN_INCORRECT | CKR_PIN_INVALID | CKR_PIN_LEN_RANGE | CKR_PIN_EXPIRED => error.fault(
            FaultKind::PinIncorrect,
            format!(
                "the token with serial number `{serial}` refused the PIN of generation {generation}; \
                 correct the PIN and raise pin.generation"
            ),
        ),
        _ => error.fault(
            FaultKind::Login,
            format!("cannot log in to the token with serial number `{serial}`"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(serial: &str, generation: u32) -> LatchNote {
        LatchNote {
            serial: serial.to_owned(),
            generation,
        }
    }

    fn kind(flags: CK_FLAGS, generation: u32, notes: &[LatchNote]) -> Option<FaultKind> {
        may_log_in(flags, "S1", generation, notes)
            .err()
            .map(|fault| fault.kind)
    }

    #[test]
    fn a_clean_token_may_be_logged_in_to() {
        assert_eq!(kind(0, 1, &[]), None);
    }

    #[test]
    fn a_note_latches_its_generation_and_every_lower_one() {
        let notes = [note("S1", 3)];
        assert_eq!(kind(0, 2, &notes), Some(FaultKind::PinLatched));
        assert_eq!(kind(0, 3, &notes), Some(FaultKind::PinLatched));
        assert_eq!(kind(0, 4, &notes), None);
    }

    #[test]
    fn a_note_of_another_token_latches_nothing() {
        assert_eq!(kind(0, 1, &[note("S2", 9)]), None);
    }

    #[test]
    fn a_locked_or_final_try_token_is_never_logged_in_to() {
        let notes = [note("S1", 1)];
        let locked = CKF_USER_PIN_LOCKED | CKF_USER_PIN_COUNT_LOW;
        assert_eq!(kind(locked, 2, &notes), Some(FaultKind::PinLocked));
        let last = CKF_USER_PIN_FINAL_TRY | CKF_USER_PIN_COUNT_LOW;
        assert_eq!(kind(last, 2, &notes), Some(FaultKind::PinFinalTry));
    }

    #[test]
    fn a_low_count_needs_a_generation_raised_over_our_own_failure() {
        let low = CKF_USER_PIN_COUNT_LOW;
        assert_eq!(kind(low, 2, &[]), Some(FaultKind::PinCountLow));
        assert_eq!(kind(low, 2, &[note("S2", 1)]), Some(FaultKind::PinCountLow));
        assert_eq!(kind(low, 2, &[note("S1", 1)]), None);
    }

    #[test]
    fn only_pin_codes_latch() {
        let code = |code| {
            refused(
                CallError {
                    function: "C_Login",
                    code,
                },
                "S1",
                1,
            )
            .kind
        };
        assert_eq!(code(CKR_PIN_INCORRECT), FaultKind::PinIncorrect);
        assert_eq!(code(CKR_PIN_LEN_RANGE), FaultKind::PinIncorrect);
        assert_eq!(code(CKR_PIN_LOCKED), FaultKind::PinLocked);
        assert_eq!(code(CKR_DEVICE_ERROR), FaultKind::Login);
        assert_eq!(code(CKR_USER_PIN_NOT_INITIALIZED), FaultKind::Login);
    }
}
