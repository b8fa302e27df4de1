//! One session thread's work: its session, its view of the keys, and the recovery ladder.
//!
//! *Expected flow.* A request takes two calls (`C_DecryptInit`, `C_Decrypt`) on an open session with
//! a known handle; nothing is searched, tested or locked exclusively on the way.
//!
//! *Errors.* A failure climbs at most three rungs: search the key again, new session (and login),
//! re-initialise. Every request here is free of side effects, so that each may be tried again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use cryptoki_sys::*;
use hsm_wire::envelope::Wrap;
use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{Answer, KeyRef, Recovery, Request, Response};
use hsm_wire::secret::Secret;
use zeroize::Zeroizing;

use crate::describe;
use crate::failure::{CallError, Failure, Rung};
use crate::key::{self, Place};
use crate::login::is_public;
use crate::token::{Live, Reinitialized, Token};
use crate::wrap::{self, Scratch};

/// Keys whose handles a thread keeps. The daemon names a handful; more means that it went wrong.
const MAX_KNOWN_KEYS: usize = 256;
const LINE_EVERY: Duration = Duration::from_secs(1);
const PROBE_AAD: &[u8] = b"talos-hsm probe v1";

/// What one session thread owns.
pub(crate) struct Worker<'t> {
    token: &'t Token,
    session: Option<CK_SESSION_HANDLE>,
    /// The generation that `session` and `handles` belong to.
    generation: u64,
    handles: HashMap<KeyRef, CK_OBJECT_HANDLE>,
    scratch: Scratch,
    /// The token said that we are not logged in: ask again whatever the session's state says.
    login_lost: bool,
    last_line: Option<Instant>,
}

impl<'t> Worker<'t> {
    /// A worker without a session yet.
    pub(crate) fn new(token: &'t Token) -> Self {
        Self {
            token,
            session: None,
            generation: 0,
            handles: HashMap::new(),
            scratch: Scratch::new(),
            login_lost: false,
            last_line: None,
        }
    }

    /// Opens the session ahead of the first request. What fails here fails again, and is reported,
    /// with that request.
    pub(crate) fn warm_up(&mut self) {
        let live = self.token.enter();
        let opened = self.open_session(&live, &mut Recovery::default());
        if let Err(Failure::Call(error)) = opened {
            log!(
                "a session thread starts without a session: {}",
                error.fault(FaultKind::Device, "it cannot be opened")
            );
        }
    }

    /// Does what is asked, climbing the ladder as far as it takes.
    pub(crate) fn answer(&mut self, id: u64, request: &Request) -> Response {
        let mut recovery = Recovery::default();
        let outcome = self.climb(request, &mut recovery);
        Response {
            id,
            recovery,
            outcome,
        }
    }

    fn climb(&mut self, request: &Request, recovery: &mut Recovery) -> Result<Answer, Fault> {
        let mut next = Some(Rung::Find);
        loop {
            let live = self.token.enter();
            let generation = live.generation;
            let failure = match self.attempt(&live, request, recovery) {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            drop(live);
            let (Some(lowest), Some(reached)) = (failure.rung(), next) else {
                return Err(failure.into_fault(doing(request)));
            };
            let rung = lowest.max(reached);
            self.log(rung, &failure, request);
            match rung {
                Rung::Find => {
                    self.forget_key(request);
                    next = Some(Rung::Session);
                }
                Rung::Session => {
                    self.login_lost = failure.is_login_lost();
                    self.replace_session(recovery);
                    next = Some(Rung::Reinitialize);
                }
                Rung::Reinitialize => {
                    next = None;
                    match self.token.reinitialize(generation)? {
                        Reinitialized::Now => recovery.reinit = true,
                        Reinitialized::Meanwhile => {}
                        // It may have been cured by the one a moment ago.
                        Reinitialized::TooSoon if !recovery.retried => {
                            self.replace_session(recovery);
                        }
                        Reinitialized::TooSoon | Reinitialized::Stuck => {
                            return Err(failure.into_fault(doing(request)));
                        }
                    }
                }
            }
        }
    }

    /// One line in a second: a token that is down fails every request.
    fn log(&mut self, rung: Rung, failure: &Failure, request: &Request) {
        if self
            .last_line
            .is_some_and(|last| last.elapsed() < LINE_EVERY)
        {
            return;
        }
        self.last_line = Some(Instant::now());
        let next = match rung {
            Rung::Find => "searching the key again",
            Rung::Session => "trying on a new session",
            Rung::Reinitialize => "the module must be re-initialised",
        };
        let fault = failure.clone().into_fault(doing(request));
        log!("{fault}; {next}");
    }

    fn replace_session(&mut self, recovery: &mut Recovery) {
        self.drop_session();
        recovery.retried = true;
    }

    fn attempt(
        &mut self,
        live: &Live,
        request: &Request,
        recovery: &mut Recovery,
    ) -> Result<Answer, Failure> {
        match self.open_session(live, recovery) {
            Ok(session) => self.perform(live, session, request),
            // The token grants no session more: take turns on the keeper.
            Err(Failure::Call(error)) if error.code == CKR_SESSION_COUNT => {
                let (session, _seat) = self.token.spare_session().ok_or(Failure::Call(error))?;
                self.perform(live, session, request)
            }
            Err(failure) => Err(failure),
        }
    }

    fn perform(
        &mut self,
        live: &Live,
        session: CK_SESSION_HANDLE,
        request: &Request,
    ) -> Result<Answer, Failure> {
        let place = Place {
            module: &self.token.module,
            session,
        };
        match request {
            Request::Open(_) => Err(Failure::settled(
                FaultKind::BadRequest,
                "the token is open already",
            )),
            Request::Describe => {
                describe::describe(self.token, &live.info, place, &mut self.scratch)
                    .map(Answer::Described)
            }
            Request::Seal {
                key,
                wrap,
                aad,
                plaintext,
            } => {
                let object = self.find_key(place, key)?;
                let scratch = &mut self.scratch;
                wrap::seal(place, object, *wrap, aad, plaintext.expose(), scratch)
                    .map(Answer::Sealed)
            }
            Request::Unseal {
                key,
                wrap,
                aad,
                sealed,
                plaintext_len,
            } => {
                let object = self.find_key(place, key)?;
                let len = *plaintext_len as usize;
                let scratch = &mut self.scratch;
                match wrap::unseal(place, object, *wrap, aad, sealed, len, scratch) {
                    Ok(plaintext) => Ok(Answer::Unsealed(plaintext)),
                    Err(Failure::Call(error))
                        if error.function == "C_Decrypt" && error.may_mean_tampered() =>
                    {
                        Err(self.tampered_or_broken(live, place, object, key, *wrap, error))
                    }
                    Err(failure) => Err(failure),
                }
            }
            Request::Probe { key, wrap } => self.probe(place, key, *wrap),
        }
    }

    /// Decides what a failed decryption was by doing one that must work, with the same key on the
    /// same session: if it does, the data is at fault; if not, token or session are.
    fn tampered_or_broken(
        &mut self,
        live: &Live,
        mut place: Place<'_>,
        object: CK_OBJECT_HANDLE,
        key: &KeyRef,
        wrap: Wrap,
        error: CallError,
    ) -> Failure {
        let mut control = self.control(place, object, key, wrap);
        // A library may leave the failed decryption active, against PKCS#11 2.40 §5.9, and then
        // nothing works on this session any more.
        if matches!(&control, Err(Failure::Call(error)) if error.code == CKR_OPERATION_ACTIVE)
            && self.session == Some(place.session)
        {
            place.module.close_session(place.session);
            self.session = None;
            control = self
                .open_session(live, &mut Recovery::default())
                .and_then(|session| {
                    place.session = session;
                    self.control(place, object, key, wrap)
                });
        }
        match control {
            Ok(()) => wrap::tampered(
                Some(error),
                "the sealed bytes do not authenticate under this key and header",
            ),
            Err(Failure::Call(_)) => Failure::Call(error),
            Err(failure) => failure,
        }
    }

    fn control(
        &mut self,
        place: Place<'_>,
        object: CK_OBJECT_HANDLE,
        key: &KeyRef,
        wrap: Wrap,
    ) -> Result<(), Failure> {
        key::check_fingerprint(place, object, key)?;
        match self.round_trip(place, object, wrap) {
            // A key that may only decrypt: its fingerprint has shown that it works.
            Err(Failure::Call(error)) if error.is_refusal() => Ok(()),
            outcome => outcome,
        }
    }

    fn probe(&mut self, place: Place<'_>, key: &KeyRef, wrap: Wrap) -> Result<Answer, Failure> {
        let object = self.find_key(place, key)?;
        // The handle may have come to mean another key (a failover, a restored backup): the
        // periodic probe is where that is noticed without slowing every request.
        key::check_fingerprint(place, object, key)?;
        self.round_trip(place, object, wrap)?;
        Ok(Answer::Probed)
    }

    /// Seals and unseals fresh random bytes.
    fn round_trip(
        &mut self,
        place: Place<'_>,
        object: CK_OBJECT_HANDLE,
        wrap: Wrap,
    ) -> Result<(), Failure> {
        let mut bytes = Zeroizing::new([0; 32]);
        place.module.random(place.session, &mut *bytes)?;
        let scratch = &mut self.scratch;
        let sealed = wrap::seal(place, object, wrap, PROBE_AAD, &*bytes, scratch)?;
        let back = wrap::unseal(
            place,
            object,
            wrap,
            PROBE_AAD,
            &sealed,
            bytes.len(),
            scratch,
        )?;
        if back == Secret::copy_of(&*bytes) {
            Ok(())
        } else {
            Err(Failure::Broken {
                function: "C_Decrypt",
                detail: "sealed bytes come back as others".to_owned(),
            })
        }
    }

    /// The open session, or a new one; logged in if the token wants that.
    fn open_session(
        &mut self,
        live: &Live,
        recovery: &mut Recovery,
    ) -> Result<CK_SESSION_HANDLE, Failure> {
        if self.generation != live.generation {
            // C_Finalize has closed the session and voided the handles.
            self.session = None;
            self.handles.clear();
            self.generation = live.generation;
            self.login_lost = false;
        }
        if let Some(session) = self.session {
            return Ok(session);
        }
        let module = &self.token.module;
        let session = module.open_session(live.slot.ok_or(Failure::NoToken)?)?;
        // Kept at once, so that a failure below closes it by the ladder's next rung.
        self.session = Some(session);
        let forgotten =
            self.login_lost || (self.token.has_pin() && is_public(module.session_state(session)?));
        if forgotten {
            recovery.relogin |= self.token.log_in_again(live, session, self.login_lost)?;
            self.login_lost = false;
        }
        Ok(session)
    }

    fn drop_session(&mut self) {
        if let Some(session) = self.session.take() {
            let live = self.token.enter();
            if self.generation == live.generation {
                self.token.module.close_session(session);
            }
        }
        for (key, handle) in self.handles.drain() {
            self.token.forget_handle(&key, handle);
        }
    }

    /// The key's handle: this thread's, another's, or found by a search.
    fn find_key(&mut self, place: Place<'_>, key: &KeyRef) -> Result<CK_OBJECT_HANDLE, Failure> {
        if let Some(object) = self.handles.get(key) {
            return Ok(*object);
        }
        let object = match self.token.known_handle(key) {
            Some(object) => object,
            None => self.search_key(place, key)?,
        };
        if self.handles.len() >= MAX_KNOWN_KEYS {
            self.handles.clear();
        }
        self.handles.insert(key.clone(), object);
        Ok(object)
    }

    fn search_key(&self, place: Place<'_>, key: &KeyRef) -> Result<CK_OBJECT_HANDLE, Failure> {
        if let Some(object) = key::find(place, key)? {
            self.token.note_handle(key, object);
            return Ok(object);
        }
        // A private key is invisible without login, which is not the same as not there.
        if self.token.has_pin() && is_public(place.module.session_state(place.session)?) {
            return Err(Failure::Call(CallError {
                function: "C_FindObjects",
                code: CKR_USER_NOT_LOGGED_IN,
            }));
        }
        if self.token.has_seen(key) {
            return Err(Failure::KeyLost(format!("the key {}", key::name(key))));
        }
        Err(Failure::settled(
            FaultKind::KeyNotFound,
            format!("the token has no secret key {}", key::name(key)),
        ))
    }

    fn forget_key(&mut self, request: &Request) {
        let (Request::Seal { key, .. } | Request::Unseal { key, .. } | Request::Probe { key, .. }) =
            request
        else {
            return;
        };
        if let Some(handle) = self.handles.remove(key) {
            self.token.forget_handle(key, handle);
        }
    }
}

fn doing(request: &Request) -> &'static str {
    match request {
        Request::Open(_) => "open",
        Request::Describe => "describe itself",
        Request::Seal { .. } => "seal",
        Request::Unseal { .. } => "unseal",
        Request::Probe { .. } => "pass the probe",
    }
}
