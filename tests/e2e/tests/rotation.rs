//! The life of keys on real parts: a rotation and back under load, a renamed cluster, ordered tokens.
//!
//! Two nodes are two daemons over two copies of one SoftHSM token, each with a kube-apiserver, on one
//! etcd. Run by `hack/test e2e`, one at a time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::cluster::{ApiServer, Credentials, Etcd};
use e2e::daemon::{CLUSTER, Daemon};
use e2e::place::{Contents, Place};
use e2e::softhsm::{KEK, SoftHsm};
use e2e::stored::{self, Stored};
use e2e::wait_for;
use e2e::workbench::Workbench;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(15);
/// kube-apiserver trusts an answer of the plugin for 20 s, then the next look at /readyz asks again.
const NOTICED: Duration = Duration::from_secs(45);
/// The second key.
const NEXT: &str = "k8s-secrets-next";
const OLD: &str = "from-before-the-rotation";
const MIDDLE: &str = "from-the-middle";

/// Two daemons with a server each. Index 0 and 1 throughout.
struct Fleet<'a> {
    bench: &'a Workbench,
    etcd: &'a Etcd,
    servers: &'a [ApiServer; 2],
    tokens: [SoftHsm; 2],
    places: [Place; 2],
    daemons: [Daemon; 2],
}

impl Fleet<'_> {
    /// One node learns a configuration.
    fn learn(&self, node: usize, contents: &Contents) -> Result<()> {
        let before = self.daemons[node].status()?["configuration"]["loaded_at"].clone();
        // The page tells seconds.
        std::thread::sleep(Duration::from_millis(1100));
        self.places[node].configure(self.bench, &[&self.tokens[node]], contents)?;
        wait_for("the configuration is taken", SOON, || {
            let status = self.daemons[node].status()?;
            let now = &status["configuration"];
            ensure!(now["rejected"].is_null(), "it was rejected: {now}");
            ensure!(now["loaded_at"] != before, "not yet");
            ensure!(status["kms"]["ready"] == true, "the daemon is not ready");
            Ok(())
        })
    }

    fn key_id(&self, node: usize) -> Result<String> {
        let status = self.daemons[node].status()?;
        let key_id = status["kms"]["key_id"].as_str();
        Ok(key_id.context("no key is active")?.to_owned())
    }

    fn restart(&mut self, node: usize) -> Result<()> {
        self.daemons[node].process().terminate(SOON)?;
        self.daemons[node] = Daemon::start_at(self.bench, &self.places[node])?;
        self.daemons[node].wait_ready(SOON)
    }

    fn stored(&self, name: &str) -> Result<Stored> {
        let raw = self.etcd.raw(&etcd_key(name))?;
        stored::read(&raw.with_context(|| format!("{name} is not in etcd"))?)
    }

    /// Waits until a node's server writes under the key_id that its daemon has.
    fn notices(&self, node: usize, round: &str) -> Result<Stored> {
        let key_id = self.key_id(node)?;
        let mut number = 0;
        wait_for("the server writes under the new key_id", NOTICED, || {
            let (ready, text) = self.servers[node].readyz()?;
            ensure!(ready, "the server is not ready: {text}");
            number += 1;
            let name = format!("look-{round}-{node}-{number}");
            self.servers[node].create_secret(&name, &name)?;
            let stored = self.stored(&name)?;
            ensure!(stored.key_id == key_id, "it still writes under {stored:?}");
            // Whatever the other node has learnt, it opens what this one just sealed.
            ensure!(
                self.servers[1 - node].secret(&name)? == name,
                "{name} reads otherwise"
            );
            Ok(stored)
        })
    }
}

fn etcd_key(name: &str) -> String {
    format!("/registry/secrets/default/{name}")
}

/// Writers and readers on both servers, without a pause.
struct Load<'a> {
    servers: &'a [ApiServer; 2],
    began: Instant,
    stop: AtomicBool,
    number: AtomicU32,
    accepted: Mutex<Vec<String>>,
    reads: AtomicU32,
    failures: Mutex<Vec<String>>,
}

impl<'a> Load<'a> {
    fn new(servers: &'a [ApiServer; 2]) -> Self {
        Self {
            servers,
            began: Instant::now(),
            stop: AtomicBool::new(false),
            number: AtomicU32::new(0),
            accepted: Mutex::default(),
            reads: AtomicU32::new(0),
            failures: Mutex::default(),
        }
    }

    fn write(&self, server: usize) {
        while !self.stop.load(Ordering::Relaxed) {
            let name = format!("load-{}", self.number.fetch_add(1, Ordering::Relaxed));
            match self.servers[server].create_secret(&name, &name) {
                Ok(()) => self.accepted.lock().expect("no panic holds it").push(name),
                Err(error) => self.fail(server, &error),
            }
            std::thread::sleep(Duration::from_millis(400));
        }
    }

    /// The newest Secret, which most likely has a seed that this server has not met, and one of all.
    fn read(&self, server: usize) {
        let mut turn = 0_usize;
        while !self.stop.load(Ordering::Relaxed) {
            turn += 1;
            let names = {
                let accepted = self.accepted.lock().expect("no panic holds it");
                // A stride that is prime to most lengths visits them all.
                let any = accepted.get((turn * 7919) % accepted.len().max(1));
                [accepted.last().cloned(), any.cloned()]
            };
            for name in names.into_iter().flatten() {
                match self.servers[server].secret(&name) {
                    Ok(value) if value == name => {}
                    Ok(value) => self.fail(server, &format!("{name} reads as {value:?}")),
                    Err(error) => self.fail(server, &error),
                }
                self.reads.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn fail(&self, server: usize, what: &dyn std::fmt::Display) {
        let text = format!(
            "after {:.1?}, server {server}: {what:#}",
            self.began.elapsed()
        );
        self.failures.lock().expect("no panic holds it").push(text);
    }

    fn names(&self) -> Vec<String> {
        self.accepted.lock().expect("no panic holds it").clone()
    }
}

#[test]
fn through_a_rotation_and_back_every_secret_is_readable_from_both_servers_at_every_moment()
-> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    token.generate_key(NEXT, "02")?;
    let tokens = [
        token.clone_named(&bench, "one")?,
        token.clone_named(&bench, "two")?,
    ];
    let places = ["one", "two"].map(|name| Place::named(&bench, name));
    for (place, token) in places.iter().zip(&tokens) {
        place.configure(
            &bench,
            &[token],
            &Contents::new(CLUSTER, &[(KEK, 1, "active")]),
        )?;
    }
    let start = |place: &Place| -> Result<Daemon> {
        let mut daemon = Daemon::start_at(&bench, place)?;
        daemon.wait_ready(SOON)?;
        Ok(daemon)
    };
    let daemons = [start(&places[0])?, start(&places[1])?];
    let etcd = Etcd::start(&bench)?;
    let credentials = Credentials::make(&bench)?;
    let serve =
        |name, daemon: &Daemon| ApiServer::start(&bench, &etcd, &credentials, &daemon.socket, name);
    let servers = [
        serve("server-one", &daemons[0])?,
        serve("server-two", &daemons[1])?,
    ];
    let mut fleet = Fleet {
        bench: &bench,
        etcd: &etcd,
        servers: &servers,
        tokens,
        places,
        daemons,
    };

    servers[0].create_secret(OLD, OLD)?;
    let first = fleet.stored(OLD)?;
    let load = Load::new(&servers);
    let snapshot = std::thread::scope(|scope| {
        for server in 0..2 {
            let load = &load;
            scope.spawn(move || load.write(server));
            scope.spawn(move || load.read(server));
        }
        let outcome = rotate_and_back(&mut fleet, &load, &first);
        load.stop.store(true, Ordering::Relaxed);
        outcome
    })?;
    let failures = load.failures.lock().expect("no panic holds it");
    ensure!(
        failures.is_empty(),
        "requests failed:\n{}",
        failures.join("\n")
    );

    // A backup from before comes back, and one from the middle.
    for (name, bytes) in &snapshot {
        etcd.put_raw(&etcd_key(name), bytes)?;
        for server in &servers {
            ensure!(server.secret(name)? == *name, "{name} reads otherwise");
        }
    }
    ensure!(
        fleet.stored(OLD)? == first,
        "the bytes from before are not back"
    );

    // The configuration is lost and written anew by somebody who remembers one key and no epoch.
    fleet.places[0].lose_configuration()?;
    wait_for("the daemon is unconfigured", SOON, || {
        let (code, text) = fleet.daemons[0].readyz()?;
        ensure!(
            code == 503 && text.contains("unconfigured"),
            "{code}: {text}"
        );
        Ok(())
    })?;
    fleet.daemons[0].process().terminate(SOON)?;
    let anew = Contents::new(CLUSTER, &[(KEK, 9, "active")]);
    fleet.places[0].configure(&bench, &[&fleet.tokens[0]], &anew)?;
    fleet.daemons[0] = start(&fleet.places[0])?;
    // A server that remembers no seed.
    let fresh = serve("server-fresh", &fleet.daemons[0])?;
    let names = load.names();
    for name in names.iter().map(String::as_str).chain([OLD, MIDDLE]) {
        ensure!(fresh.secret(name)? == name, "{name} reads otherwise");
    }
    let counters = fleet.daemons[0].status()?["kms"]["counters"].clone();
    ensure!(counters["decrypt_failed"] == 0, "{counters}");
    ensure!(
        counters["decrypt_unlisted"].as_u64() > Some(0),
        "nothing was opened with the key that no rule names any more: {counters}"
    );
    println!(
        "{} Secrets written and {} reads under load, none refused; all read back by a server and a daemon that remember nothing",
        names.len(),
        load.reads.load(Ordering::Relaxed)
    );
    Ok(())
}

type Snapshot = Vec<(&'static str, Vec<u8>)>;

/// A → B → A again. Returns what a backup of etcd had kept of two Secrets.
fn rotate_and_back(fleet: &mut Fleet<'_>, load: &Load<'_>, first: &Stored) -> Result<Snapshot> {
    let keep = |fleet: &Fleet<'_>, name| {
        let raw = fleet.etcd.raw(&etcd_key(name))?;
        Ok::<_, anyhow::Error>((name, raw.context("it is not in etcd")?))
    };
    let mut snapshot = vec![keep(fleet, OLD)?];

    let announced = Contents::new(CLUSTER, &[(KEK, 1, "active"), (NEXT, 2, "pending")]);
    fleet.learn(0, &announced)?;
    std::thread::sleep(Duration::from_secs(2));
    fleet.learn(1, &announced)?;
    ensure!(
        fleet.key_id(0)? == first.key_id,
        "announcing changed the key_id"
    );

    let activated = Contents::new(CLUSTER, &[(KEK, 1, "retired"), (NEXT, 2, "active")]);
    fleet.learn(0, &activated)?;
    let second = fleet.notices(0, "next")?;
    ensure!(
        second.fingerprint != first.fingerprint,
        "the same key sealed"
    );
    // Restarted with B only pending, while the other node seals with it.
    fleet.restart(1)?;
    fleet.learn(1, &activated)?;
    ensure!(fleet.notices(1, "next")? == second, "the nodes disagree");
    migrate(fleet, load, &second)?;
    ensure!(
        fleet.stored(OLD)? == second,
        "the old Secret was not rewritten"
    );
    fleet.servers[1].create_secret(MIDDLE, MIDDLE)?;
    snapshot.push(keep(fleet, MIDDLE)?);

    // Back, in the other order. As a step of one it is refused: every node has to know first.
    let back = Contents::new(CLUSTER, &[(NEXT, 2, "active"), (KEK, 3, "pending")]);
    fleet.learn(1, &back)?;
    fleet.learn(0, &back)?;
    let returned = Contents::new(CLUSTER, &[(NEXT, 2, "retired"), (KEK, 3, "active")]);
    fleet.learn(1, &returned)?;
    let third = fleet.notices(1, "back")?;
    ensure!(
        third.fingerprint == first.fingerprint,
        "another key came back"
    );
    ensure!(third.key_id != first.key_id, "a key_id came back");
    std::thread::sleep(Duration::from_secs(2));
    fleet.learn(0, &returned)?;
    ensure!(fleet.notices(0, "back")? == third, "the nodes disagree");
    migrate(fleet, load, &third)?;
    Ok(snapshot)
}

/// Rewrites every Secret, and sees that nothing is left under another key_id.
fn migrate(fleet: &Fleet<'_>, load: &Load<'_>, wanted: &Stored) -> Result<()> {
    let mut names = load.names();
    names.push(OLD.to_owned());
    let (left, right) = names.split_at(names.len() / 2);
    std::thread::scope(|scope| {
        let halves = [(0, left), (1, right)].map(|(server, names)| {
            scope.spawn(move || {
                let server = &fleet.servers[server];
                names
                    .iter()
                    .try_for_each(|name| server.rewrite_secret(name))
            })
        });
        for half in halves {
            let Ok(outcome) = half.join() else {
                bail!("the migration panicked")
            };
            outcome?;
        }
        Ok(())
    })?;
    // With what was written meanwhile.
    for value in fleet.etcd.values("/registry/secrets/default/load-")? {
        let found = stored::read(&value)?;
        ensure!(found == *wanted, "a Secret is still under {found:?}");
    }
    Ok(())
}

#[test]
fn under_another_name_a_cluster_reads_its_secrets_only_once_the_former_name_is_accepted()
-> Result<()> {
    let bench = Workbench::open()?;
    let token = SoftHsm::create(&bench)?;
    let place = Place::only(&bench);
    let keys = [(KEK, 1, "active")];
    place.configure(&bench, &[&token], &Contents::new("before", &keys))?;
    let mut daemon = Daemon::start(&bench)?;
    daemon.wait_ready(SOON)?;
    let etcd = Etcd::start(&bench)?;
    let credentials = Credentials::make(&bench)?;
    let server = ApiServer::start(&bench, &etcd, &credentials, &daemon.socket, "before")?;
    server.create_secret(OLD, OLD)?;
    drop(server);
    daemon.process().terminate(SOON)?;

    // Its etcd, restored into a cluster of another name.
    place.configure(&bench, &[&token], &Contents::new("after", &keys))?;
    daemon = Daemon::start(&bench)?;
    daemon.wait_ready(SOON)?;
    let mut server = ApiServer::launch(&bench, &etcd, &credentials, &daemon.socket, "after")?;
    let sentence =
        "this one is `after`; if it is a former name of this cluster, add it to accept_clusters";
    wait_for(
        "the Secret is refused with a way out",
        Duration::from_secs(90),
        || {
            server.process().still_runs()?;
            match server.secret(OLD) {
                Ok(value) => bail!("it reads as {value:?}"),
                Err(error) => ensure!(format!("{error:#}").contains(sentence), "{error:#}"),
            }
            Ok(())
        },
    )?;
    ensure!(
        daemon.process().log().contains(sentence),
        "the daemon's log does not tell:\n{}",
        daemon.process().log_end(10)
    );

    // The sentence is followed; nothing is restarted.
    let accepting = Contents::new("after", &keys).accepting("before");
    place.configure(&bench, &[&token], &accepting)?;
    wait_for("the Secret is readable", SOON, || {
        ensure!(server.secret(OLD)? == OLD, "it reads otherwise");
        Ok(())
    })
}

const SWITCHED: &str = "another token serves now";

/// A node without an API server, called as one.
struct Node<'a> {
    bench: &'a Workbench,
    daemon: Daemon,
}

impl Node<'_> {
    fn start<'a>(bench: &'a Workbench, tokens: &[&SoftHsm]) -> Result<Node<'a>> {
        let contents = Contents::new(CLUSTER, &[(KEK, 1, "active")]);
        Place::only(bench).configure(bench, tokens, &contents)?;
        let mut daemon = Daemon::start(bench)?;
        daemon.wait_ready(SOON)?;
        Ok(Node { bench, daemon })
    }

    /// A sealed seed: envelope and key_id.
    fn encrypt(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        let request = [&[0x0a, 32][..], &[7; 32]].concat();
        let answer = self.daemon.call(self.bench, "Encrypt", &request)?;
        ensure!(answer.code == Some(0), "Encrypt answers {answer:?}");
        let message = answer.body.get(5..).context("an empty answer")?;
        let part =
            |number| Ok::<_, anyhow::Error>(stored::field(message, number)?.map(<[u8]>::to_vec));
        Ok((
            part(1)?.context("no envelope")?,
            part(2)?.context("no key_id")?,
        ))
    }

    fn opens(&self, (envelope, key_id): &(Vec<u8>, Vec<u8>)) -> Result<()> {
        let field = |tag: u8, bytes: &[u8]| [&[tag, bytes.len() as u8][..], bytes].concat();
        ensure!(envelope.len() < 128, "a longer length than this writes");
        let request = [field(0x0a, envelope), field(0x1a, key_id)].concat();
        let answer = self.daemon.call(self.bench, "Decrypt", &request)?;
        ensure!(answer.code == Some(0), "Decrypt answers {answer:?}");
        Ok(())
    }

    fn token_is(&self, index: usize, state: &str) -> Result<()> {
        wait_for(
            &format!("token {index} is {state}"),
            Duration::from_secs(30),
            || {
                let status = self.daemon.status()?;
                let token = &status["tokens"][index];
                ensure!(token["state"] == state, "{token}");
                Ok(())
            },
        )
    }

    fn switches(&mut self) -> usize {
        self.daemon.process().log().matches(SWITCHED).count()
    }
}

#[test]
fn a_clone_serves_while_the_first_token_is_away_and_hands_back_without_flapping() -> Result<()> {
    let bench = Workbench::open()?;
    let first = SoftHsm::create_named(&bench, "first")?;
    let second = first.clone_named(&bench, "second")?;
    let mut node = Node::start(&bench, &[&first, &second])?;
    node.token_is(1, "up")?;
    let before = node.encrypt()?;

    first.take_away()?;
    node.token_is(0, "down")?;
    let during = node.encrypt()?;
    ensure!(during.1 == before.1, "the key_id changed with the token");
    node.opens(&before)?;
    node.daemon.wait_ready(SOON)?;
    ensure!(node.switches() == 1, "{} switches", node.switches());

    // It comes back, its host dies, it comes back again: nobody follows it.
    first.bring_back()?;
    node.token_is(0, "up")?;
    let host = node.daemon.host_pid()?;
    kill(Pid::from_raw(host), Signal::SIGKILL)?;
    wait_for("the first token has another host", SOON, || {
        ensure!(node.daemon.host_pid()? != host, "it has not");
        Ok(())
    })?;
    node.token_is(0, "up")?;
    let back = Instant::now();
    node.opens(&during)?;
    ensure!(
        node.switches() == 1,
        "it flaps: {} switches",
        node.switches()
    );

    wait_for(
        "the first token serves again",
        Duration::from_secs(60),
        || {
            ensure!(node.switches() == 2, "{} switches", node.switches());
            Ok(())
        },
    )?;
    let took = back.elapsed();
    ensure!(
        took > Duration::from_secs(25),
        "it came back after {took:.1?} only"
    );
    node.opens(&before)?;
    node.opens(&during)?;
    ensure!(
        node.encrypt()?.1 == before.1,
        "the key_id changed with the token"
    );
    println!("the first token serves again {took:.1?} after it came back");
    Ok(())
}

#[test]
fn another_key_under_the_same_label_is_refused_by_its_fingerprint_and_named() -> Result<()> {
    let bench = Workbench::open()?;
    let first = SoftHsm::create_named(&bench, "first")?;
    let impostor = SoftHsm::create_named(&bench, "impostor")?;
    let node = Node::start(&bench, &[&first, &impostor])?;
    node.token_is(1, "up")?;
    let sealed = node.encrypt()?;
    let named = "token `impostor` holds another key";
    let status = node.daemon.status()?;
    let problem = status["keys"][0]["problem"].as_str().unwrap_or_default();
    ensure!(problem.contains(named), "{status}");

    first.take_away()?;
    node.token_is(0, "down")?;
    let request = [&[0x0a, 32][..], &[7; 32]].concat();
    let answer = node.daemon.call(&bench, "Encrypt", &request)?;
    ensure!(answer.code == Some(14), "Encrypt answers {answer:?}");
    let (code, text) = node.daemon.readyz()?;
    ensure!(
        code == 503 && text.contains(named),
        "/readyz is {code}: {text}"
    );

    first.bring_back()?;
    node.token_is(0, "up")?;
    wait_for("it opens again", SOON, || node.opens(&sealed))
}
