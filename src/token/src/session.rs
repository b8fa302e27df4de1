//! One session thread's work: its session, its view of the keys, and the recovery ladder.
//!
//! *Expected flow.* A request takes two calls (`C_DecryptInit`, `C_Decrypt`) on an open session with
//! a known handle; nothing is searched, tested or locked exclusively on the way.
//!
//! *Errors.* A failure climbs at most three rungs: search the key again, new session (and login),
//! re-initialise. Every request here is free of side effects, so that each may be tried again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptoki_sys::*;
use hsm_wire::envelope::{IvMode, Mechanism, Wrap};
use hsm_wire::fault::{Fault, FaultKind};
use hsm_wire::host::{Answer, KeyRef, Recovery, Request, Response};
use hsm_wire::secret::Secret;
use zeroize::Zeroizing;

use crate::describe;
use crate::failure::{CallError, Failure, Rung};
use crate::key::{self, Place};
use crate::login::is_public;
use crate::token::{Live, Reinitialized, Token};
use crate::wrap::{self, Key, Partners, Scratch};

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
    /// Of the keys in `handles` whose wrap needs them.
    partners: HashMap<KeyRef, Arc<Partners>>,
    /// For those whose wrap does not.
    no_partners: Arc<Partners>,
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
            partners: HashMap::new(),
            no_partners: Arc::default(),
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
                let object = self.find_key(place, key, *wrap)?;
                let partners = self.partners(place, key, object, *wrap, None)?;
                let with = Key {
                    key,
                    object,
                    partners: &partners,
                };
                let scratch = &mut self.scratch;
                wrap::seal(place, &with, *wrap, aad, plaintext.expose(), scratch)
                    .map(Answer::Sealed)
            }
            Request::Unseal {
                key,
                wrap,
                aad,
                sealed,
                plaintext_len,
            } => {
                let object = self.find_key(place, key, *wrap)?;
                let partners = self.partners(place, key, object, *wrap, Some(sealed))?;
                let with = Key {
                    key,
                    object,
                    partners: &partners,
                };
                let len = *plaintext_len as usize;
                let scratch = &mut self.scratch;
                match wrap::unseal(place, &with, *wrap, aad, sealed, len, scratch) {
                    Ok(plaintext) => Ok(Answer::Unsealed(plaintext)),
                    Err(Failure::Call(error))
                        if ["C_Decrypt", "C_UnwrapKey"].contains(&error.function)
                            && error.may_mean_tampered() =>
                    {
                        Err(self.tampered_or_broken(live, place, &with, *wrap, error))
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
        key: &Key<'_>,
        wrap: Wrap,
        error: CallError,
    ) -> Failure {
        let mut control = self.control(place, key, wrap);
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
                    self.control(place, key, wrap)
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

    fn control(&mut self, place: Place<'_>, key: &Key<'_>, wrap: Wrap) -> Result<(), Failure> {
        key::check_fingerprint(place, key.object, wrap::class_of(wrap), key.key)?;
        // What was sealed where the token chose the IV also opens where it does not; sealing so does
        // not work there.
        let wrap = match wrap.iv_mode {
            IvMode::Returned | IvMode::Appended => {
                let choice = self.token.known_choice(&key.key.fingerprint);
                match choice.map(|choice| choice.wrap) {
                    Some(Ok(chosen)) if chosen.mechanism == Mechanism::AesGcm => chosen,
                    // Its fingerprint has shown that key and session work.
                    _ => return Ok(()),
                }
            }
            IvMode::None | IvMode::Caller => wrap,
        };
        match self.round_trip(place, key, wrap) {
            // A key that may only decrypt: its fingerprint has shown that it works.
            Err(Failure::Call(error)) if error.is_refusal() => Ok(()),
            outcome => outcome,
        }
    }

    fn probe(&mut self, place: Place<'_>, key: &KeyRef, wrap: Wrap) -> Result<Answer, Failure> {
        let object = self.find_key(place, key, wrap)?;
        let partners = self.partners(place, key, object, wrap, None)?;
        // The handle may have come to mean another key (a failover, a restored backup): the
        // periodic probe is where that is noticed without slowing every request.
        key::check_fingerprint(place, object, wrap::class_of(wrap), key)?;
        let with = Key {
            key,
            object,
            partners: &partners,
        };
        self.round_trip(place, &with, wrap)?;
        Ok(Answer::Probed)
    }

    /// Seals and unseals fresh random bytes.
    fn round_trip(&mut self, place: Place<'_>, key: &Key<'_>, wrap: Wrap) -> Result<(), Failure> {
        let mut bytes = Zeroizing::new([0; 32]);
        place.module.random(place.session, &mut *bytes)?;
        let scratch = &mut self.scratch;
        let sealed = wrap::seal(place, key, wrap, PROBE_AAD, &*bytes, scratch)?;
        let back = wrap::unseal(place, key, wrap, PROBE_AAD, &sealed, bytes.len(), scratch)?;
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
            self.partners.clear();
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
        self.partners.clear();
        for (key, handle) in self.handles.drain() {
            self.token.forget_handle(&key, handle);
        }
    }

    /// The key's handle: this thread's, another's, or found by a search.
    fn find_key(
        &mut self,
        place: Place<'_>,
        key: &KeyRef,
        wrap: Wrap,
    ) -> Result<CK_OBJECT_HANDLE, Failure> {
        if let Some(object) = self.handles.get(key) {
            return Ok(*object);
        }
        let object = match self.token.known_handle(key) {
            Some(object) => object,
            None => self.search_key(place, key, wrap)?,
        };
        if self.handles.len() >= MAX_KNOWN_KEYS {
            self.handles.clear();
            self.partners.clear();
        }
        self.handles.insert(key.clone(), object);
        Ok(object)
    }

    /// What `wrap` needs beside the key: noted, or found by a search where what is noted does not do.
    fn partners(
        &mut self,
        place: Place<'_>,
        key: &KeyRef,
        object: CK_OBJECT_HANDLE,
        wrap: Wrap,
        sealed: Option<&[u8]>,
    ) -> Result<Arc<Partners>, Failure> {
        if !wrap::needs_partners(wrap) {
            return Ok(Arc::clone(&self.no_partners));
        }
        if let Some(known) = self.partners.get(key) {
            let does = match sealed {
                Some(sealed) => known.macs.has_maker_of(sealed),
                None => !known.macs.is_empty(),
            };
            if does {
                return Ok(Arc::clone(known));
            }
        }
        let found = key::find_partners(place, wrap::class_of(wrap), key, object)?;
        let found = Arc::new(found);
        self.partners.insert(key.clone(), Arc::clone(&found));
        Ok(found)
    }

    fn search_key(
        &self,
        place: Place<'_>,
        key: &KeyRef,
        wrap: Wrap,
    ) -> Result<CK_OBJECT_HANDLE, Failure> {
        let class = wrap::class_of(wrap);
        if let Some(object) = key::find(place, class, key)? {
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
            format!(
                "the token has no {} {}",
                key::class_name(class),
                key::name(key)
            ),
        ))
    }

    fn forget_key(&mut self, request: &Request) {
        let (Request::Seal { key, .. } | Request::Unseal { key, .. } | Request::Probe { key, .. }) =
            request
        else {
            return;
        };
        self.partners.remove(key);
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
