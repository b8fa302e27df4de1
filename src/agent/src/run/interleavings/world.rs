//! A fleet in memory: real keyrings over fake tokens, configurations that were really parsed, and API
//! servers that prime, coast and forget. Every step is followed by the question whether all is well.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use hsm_config::plan::{self, Illegal};
use hsm_config::{Config, KeyState};
use hsm_token_client::fake::{Fake, FakeKey, SERIAL};
use hsm_token_client::{State, Token};
use hsm_wire::secret::Secret;
use hsm_wire::uri::Uri;
use tokio::time::Instant;

use super::{Edit, Step};
use crate::keyring::{Keyring, KeyringError, NamedToken};

pub(super) const KEYS: [&str; 3] = ["a", "b", "c"];
pub(super) const NAMES: [&str; 3] = ["x", "y", "z"];
/// kube-apiserver writes under a seed for this long after the last Status that confirmed it.
const COAST_MINUTES: u64 = 3;
const SEED: [u8; 32] = [7; 32];

/// A configuration file, before it is text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct File {
    pub(super) own: usize,
    pub(super) accepted: Vec<usize>,
    /// Key, epoch, state.
    pub(super) rules: Vec<(usize, u32, KeyState)>,
}

impl File {
    pub(super) fn new(own: usize, key: usize, epoch: u32) -> Self {
        Self {
            own,
            accepted: Vec::new(),
            rules: vec![(key, epoch, KeyState::Active)],
        }
    }

    /// What the daemon makes of it; none if it refuses the file by itself.
    pub(super) fn parse(&self) -> Option<Config> {
        let accepted: Vec<_> = self.accepted.iter().map(|name| NAMES[*name]).collect();
        let mut text = format!(
            "cluster: {}\naccept_clusters: [{}]\ntokens:\n  - {{name: main, uri: 'pkcs11:serial={SERIAL}', module: /m.so, pin: {{file: /pin}}}}\nkms:\n  keys:\n",
            NAMES[self.own],
            accepted.join(", ")
        );
        for (key, epoch, state) in &self.rules {
            text += &format!(
                "    - {{uri: 'pkcs11:serial={SERIAL};object={};type=secret-key', epoch: {epoch}, state: {}, backup: acknowledged}}\n",
                KEYS[*key],
                state.name()
            );
        }
        hsm_config::parse(&text, "hsmd.yaml").ok()
    }

    pub(super) fn names(&self, name: usize) -> bool {
        self.own == name || self.accepted.contains(&name)
    }

    fn active(&self) -> Option<(usize, u32)> {
        let mut rules = self.rules.iter();
        let active = rules.find(|(_, _, state)| *state == KeyState::Active);
        active.map(|(key, epoch, _)| (*key, *epoch))
    }

    fn lists(&self, key: usize) -> bool {
        self.rules.iter().any(|(listed, _, _)| *listed == key)
    }
}

/// What kube-apiserver stores, and the name it was sealed under.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Write {
    envelope: Vec<u8>,
    key_id: String,
    cluster: usize,
}

/// One node's daemon, token and kube-apiserver.
struct Node {
    fake: Fake,
    holds: HashSet<usize>,
    /// On disk.
    file: Option<File>,
    /// None while the daemon is down.
    daemon: Option<Daemon>,
    /// What its kube-apiserver writes under, and until which minute.
    seed: Option<(Write, u64)>,
}

/// A life of hsmd, from start to stop.
struct Daemon {
    token: NamedToken,
    running: Option<(File, Arc<Keyring>)>,
    /// As in the real one: also after the file is gone.
    last: Option<Config>,
    /// What sealed in this life, in order.
    sealed: Vec<(usize, u32)>,
}

/// What must not be.
pub(super) type Violation = String;

/// Everything.
pub(super) struct World {
    nodes: Vec<Node>,
    /// What the operator published, the newest last.
    published: Vec<File>,
    store: HashSet<Write>,
    /// What each key_id means.
    meaning: HashMap<String, (usize, u32, usize)>,
    minute: u64,
    /// A rule of `plan` that does not exist.
    skipped: Option<fn(&Illegal) -> bool>,
}

impl World {
    pub(super) async fn new(nodes: usize, skipped: Option<fn(&Illegal) -> bool>) -> Self {
        let first = File::new(0, 0, 1);
        let mut world = Self {
            nodes: Vec::new(),
            published: vec![first.clone()],
            store: HashSet::new(),
            meaning: HashMap::new(),
            minute: 0,
            skipped,
        };
        for index in 0..nodes {
            world.nodes.push(Node {
                fake: Fake::new([FakeKey::new(KEYS[0], 1)]),
                holds: HashSet::from([0]),
                file: Some(first.clone()),
                daemon: None,
                seed: None,
            });
            let started = world.start(index).await;
            assert_eq!(started, Ok(()));
        }
        world
    }

    pub(super) async fn take(&mut self, step: &Step) -> Result<(), Violation> {
        let count = self.nodes.len();
        match step {
            Step::Edit(edit) => self.publish(edit)?,
            Step::Learn(node) => self.give(node % count, self.newest().clone()).await?,
            Step::LearnAll => {
                for node in 0..count {
                    self.give(node, self.newest().clone()).await?;
                }
            }
            Step::GoBack(node, which) => {
                let file = which.get(&self.published).clone();
                if self.harmless(node % count, &file) {
                    self.give(node % count, file).await?;
                }
            }
            Step::WriteAnew(node, epoch) => {
                let newest = self.newest();
                let (key, _) = newest.active().expect("it was parsed");
                let mut file = File::new(newest.own, key, *epoch);
                file.accepted = newest.accepted.clone();
                if self.harmless(node % count, &file) {
                    self.give(node % count, file).await?;
                }
            }
            Step::Lose(node) => {
                let node = &mut self.nodes[node % count];
                node.file = None;
                if let Some(daemon) = &mut node.daemon {
                    daemon.running = None;
                }
            }
            Step::Stop(node) => self.stop(node % count).await,
            Step::Start(node) => self.start(node % count).await?,
            Step::Generate(key, node) => self.copy(key % KEYS.len(), [node % count]).await,
            Step::Clone(key) => self.copy(key % KEYS.len(), 0..count).await,
            Step::Poll(node) => self.poll(node % count).await?,
            Step::Write(node) => self.write(node % count).await?,
            Step::Forget(node) => self.nodes[node % count].seed = None,
            Step::Minutes(minutes) => self.minute += u64::from(*minutes),
            Step::Migrate(node) => self.migrate(node % count).await?,
        }
        Ok(())
    }

    fn newest(&self) -> &File {
        self.published.last().expect("the first is never removed")
    }

    // The operator.

    fn publish(&mut self, edit: &Edit) -> Result<(), Violation> {
        let old = self.newest();
        let new = edit.apply(old);
        let (Some(before), Some(after)) = (old.parse(), new.parse()) else {
            return Ok(());
        };
        if *old == new || !self.may_follow(&before, &after) || !self.obliged(old, &new) {
            return Ok(());
        }
        let active: Vec<_> = self.published.iter().filter_map(File::active).collect();
        never_returns(&active, new.active())?;
        self.published.push(new);
        Ok(())
    }

    fn may_follow(&self, old: &Config, new: &Config) -> bool {
        match plan::check(old, new) {
            Ok(()) => true,
            Err(illegal) => self.skipped.is_some_and(|skipped| skipped(&illegal)),
        }
    }

    /// What `hsmctl kms plan` says must be true before the first node takes a legal step.
    fn obliged(&self, old: &File, new: &File) -> bool {
        // "every node's token has to hold it"
        let begins = new.active().filter(|(key, _)| old.lists(*key));
        let held =
            begins.is_none_or(|(key, _)| self.nodes.iter().all(|node| node.holds.contains(&key)));
        // "every node has to accept NAME (the old configuration does)"
        let renamed = old.own != new.own;
        let taken = !renamed || self.nodes.iter().all(|node| node.follows(old));
        // "every Secret that was sealed under NAME has to be rewritten, and no node may still seal
        // under that name"
        let dropped = old.accepted.iter().filter(|name| !new.names(**name));
        let mut dropped = dropped.filter(|name| self.is_used(**name));
        held && taken && dropped.next().is_none()
    }

    fn is_used(&self, name: usize) -> bool {
        let seeds = self.nodes.iter().filter_map(|node| node.seed.as_ref());
        let writes = self.store.iter().chain(seeds.map(|(write, _)| write));
        let mut files = self.nodes.iter().flat_map(Node::files);
        writes.into_iter().any(|write| write.cluster == name) || files.any(|file| file.own == name)
    }

    /// The same, for a file that comes from no plan: an older one, or one written anew by hand.
    fn harmless(&self, node: usize, file: &File) -> bool {
        let used = (0..NAMES.len()).filter(|name| self.is_used(*name));
        let known = used.chain([self.newest().own]).all(|name| file.names(name));
        let others = (0..self.nodes.len()).filter(|other| *other != node);
        let mut others = others.flat_map(|other| self.nodes[other].files());
        let accepted = others.all(|other| other.names(file.own)) && self.newest().names(file.own);
        let held = file
            .active()
            .is_some_and(|(key, _)| self.nodes.iter().all(|node| node.holds.contains(&key)));
        known && accepted && held
    }

    /// A key comes to these nodes' tokens, and their daemons have seen it.
    pub(super) async fn copy(&mut self, key: usize, nodes: impl IntoIterator<Item = usize>) {
        for index in nodes {
            let node = &mut self.nodes[index];
            node.holds.insert(key);
            let keys = node.holds.iter();
            node.fake
                .set_keys(keys.map(|key| FakeKey::new(KEYS[*key], *key as u8 + 1)));
            if let Some((_, keyring)) = self.running(index) {
                keyring.look_again(soon()).await;
            } else if let Some(daemon) = &self.nodes[index].daemon {
                let _ = daemon.token.token.refresh(soon()).await;
            }
        }
    }

    // A node's daemon.

    async fn start(&mut self, index: usize) -> Result<(), Violation> {
        let node = &mut self.nodes[index];
        if node.daemon.is_some() {
            return Ok(());
        }
        let token = Token::start_with_fake("main", &node.fake);
        let up = |state: &State| matches!(state, State::Up { .. });
        token.state().wait_for(up).await.expect("a fake comes up");
        node.daemon = Some(Daemon {
            token: NamedToken {
                name: "main".to_owned(),
                uri: Uri::parse(&format!("pkcs11:serial={SERIAL}")).expect("a URI"),
                token,
            },
            running: None,
            last: None,
            sealed: Vec::new(),
        });
        match node.file.clone() {
            Some(file) => self.give(index, file).await,
            None => Ok(()),
        }
    }

    async fn stop(&mut self, index: usize) {
        if let Some(daemon) = self.nodes[index].daemon.take() {
            daemon.token.token.stop().await;
        }
    }

    /// A file comes to a node's disk; its daemon, if it is up, does what `Daemon::take` does.
    pub(super) async fn give(&mut self, index: usize, file: File) -> Result<(), Violation> {
        let Some(config) = file.parse() else {
            return Ok(());
        };
        let legal = match self.nodes[index]
            .daemon
            .as_ref()
            .and_then(|daemon| daemon.last.as_ref())
        {
            Some(last) => self.may_follow(last, &config),
            None => true,
        };
        let node = &mut self.nodes[index];
        node.file = Some(file.clone());
        let Some(daemon) = node.daemon.as_mut().filter(|_| legal) else {
            return Ok(());
        };
        never_returns(&daemon.sealed, file.active())?;
        daemon.sealed.extend(file.active());
        let keyring = Keyring::new(
            config.clusters.clone(),
            config.kms.keys.clone(),
            vec![daemon.token.clone()],
            daemon.running.as_ref().map(|(_, keyring)| &**keyring),
        );
        daemon.running = Some((file, keyring));
        daemon.last = Some(config);
        for write in &self.store {
            self.opens(index, write).await?;
        }
        Ok(())
    }

    fn running(&self, index: usize) -> Option<&(File, Arc<Keyring>)> {
        self.nodes[index].daemon.as_ref()?.running.as_ref()
    }

    // A node's kube-apiserver.

    /// Status, and Encrypt if there is another key_id.
    async fn poll(&mut self, index: usize) -> Result<(), Violation> {
        let Some((file, keyring)) = self.running(index) else {
            return Ok(());
        };
        let Ok(active) = keyring.active() else {
            return Ok(());
        };
        let cluster = file.own;
        let meant = file.active().expect("it was parsed");
        let fresh = self.nodes[index]
            .seed
            .clone()
            .filter(|(write, _)| write.key_id == active.key_id);
        let write = match fresh {
            Some((write, _)) => write,
            None => {
                let sealed = keyring.seal(Secret::copy_of(&SEED), soon()).await;
                let (envelope, key_id) =
                    sealed.map_err(|error| format!("Encrypt failed: {error}"))?;
                if key_id != active.key_id {
                    return Err("Encrypt and Status show different key_ids".to_owned());
                }
                Write {
                    envelope,
                    key_id,
                    cluster,
                }
            }
        };
        let now = (meant.0, meant.1, cluster);
        let before = *self.meaning.entry(write.key_id.clone()).or_insert(now);
        if before != now {
            return Err(format!(
                "key_id {} means {before:?} and {now:?}",
                write.key_id
            ));
        }
        if self
            .meaning
            .iter()
            .any(|(key_id, meaning)| *meaning == now && *key_id != write.key_id)
        {
            return Err(format!("{now:?} has two key_ids"));
        }
        self.nodes[index].seed = Some((write, self.minute + COAST_MINUTES));
        Ok(())
    }

    fn seed(&self, index: usize) -> Option<&Write> {
        let (write, until) = self.nodes[index].seed.as_ref()?;
        (self.minute <= *until).then_some(write)
    }

    /// The API server accepts a write, also while its daemon is away: it coasts.
    async fn write(&mut self, index: usize) -> Result<(), Violation> {
        let Some(write) = self.seed(index).cloned() else {
            return Ok(());
        };
        for node in 0..self.nodes.len() {
            self.opens(node, &write).await?;
        }
        self.store.insert(write);
        Ok(())
    }

    async fn migrate(&mut self, index: usize) -> Result<(), Violation> {
        self.write(index).await?;
        if let (Some(seed), Some(_)) = (self.seed(index).cloned(), self.running(index)) {
            for write in &self.store {
                self.opens(index, write).await?;
            }
            self.store = HashSet::from([seed]);
        }
        Ok(())
    }

    /// The invariant: whoever is up and configured opens whatever was accepted.
    async fn opens(&self, index: usize, write: &Write) -> Result<(), Violation> {
        match self.open(index, write).await {
            Some(Err(error)) => Err(format!("node {index} does not open a write: {error}")),
            _ => Ok(()),
        }
    }

    async fn open(&self, index: usize, write: &Write) -> Option<Result<(), KeyringError>> {
        let (_, keyring) = self.running(index)?;
        let opened = keyring.open(&write.envelope, &write.key_id, soon()).await;
        Some(opened.map(|opened| assert_eq!(opened.plaintext.expose(), SEED)))
    }

    // For tests that tell one story.

    /// What a node's kube-apiserver writes under.
    pub(super) fn sealed_by(&self, index: usize) -> Write {
        self.seed(index).expect("the server is primed").clone()
    }

    /// What a node's daemon says to a Decrypt.
    pub(super) async fn decrypt(&self, index: usize, write: &Write) -> Result<(), String> {
        let outcome = self
            .open(index, write)
            .await
            .expect("the daemon is up and configured");
        outcome.map_err(|error| error.to_string())
    }

    pub(super) fn published(&self) -> &File {
        self.newest()
    }
}

impl Node {
    /// On disk and in force; a file that was refused may be in force after a restart.
    fn files(&self) -> impl Iterator<Item = &File> {
        let running = self
            .daemon
            .as_ref()
            .and_then(|daemon| daemon.running.as_ref());
        self.file.iter().chain(running.map(|(file, _)| file))
    }

    /// It has taken this file, or will when it starts, or has none.
    fn follows(&self, file: &File) -> bool {
        self.files().all(|own| own == file)
    }
}

/// "A key_id never comes back": a key and epoch that were superseded.
fn never_returns(sealed: &[(usize, u32)], next: Option<(usize, u32)>) -> Result<(), Violation> {
    let superseded = sealed.last() != next.as_ref();
    match next.filter(|next| superseded && sealed.contains(next)) {
        Some(next) => Err(format!("{next:?} comes back after {:?}", sealed.last())),
        None => Ok(()),
    }
}

pub(super) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(3)
}
