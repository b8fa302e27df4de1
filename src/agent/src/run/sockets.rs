//! The sockets that lead to the KMS face: who is let in, and how clients are sent elsewhere.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::kms::{self, Face};
use crate::listen::{self, Endpoint, Incoming, Listener};
use crate::peer::{self, Complaints, EndpointKind, Rules};

/// What every accepted connection needs.
#[derive(Clone)]
pub(super) struct Gate {
    pub(super) face: Arc<Face>,
    /// Replaced by a configuration; a connection is judged by the rules in force when it comes.
    pub(super) rules: Arc<RwLock<Rules>>,
    pub(super) complaints: Arc<Complaints>,
}

/// The sockets that are open now.
pub(super) struct Sockets {
    gate: Gate,
    open: Vec<Door>,
}

struct Door {
    listener: Listener,
    drain: watch::Sender<bool>,
    connections: JoinHandle<()>,
}

impl Sockets {
    /// None yet.
    pub(super) fn new(gate: Gate) -> Self {
        Self {
            gate,
            open: Vec::new(),
        }
    }

    /// Makes the open sockets those that are wanted: new ones first, so that there is no moment
    /// without any; then the clients of the others are sent away (GOAWAY) and those closed.
    pub(super) async fn set(&mut self, wanted: &[Endpoint]) {
        for endpoint in wanted {
            if !self
                .open
                .iter()
                .any(|door| door.listener.endpoint() == endpoint)
            {
                self.open.push(self.gate.open(endpoint.clone()));
            }
        }
        let (keep, leave) = self
            .open
            .drain(..)
            .partition(|door| wanted.contains(door.listener.endpoint()));
        self.open = keep;
        for door in leave {
            // Its connections end by themselves, each when its last call is answered.
            door.close().await;
        }
    }

    /// Closes all and waits until every call under way is answered.
    pub(super) async fn drain(self) {
        let mut ends = Vec::new();
        for door in self.open {
            ends.push(door.close().await);
        }
        for end in ends {
            let _ = end.await;
        }
    }

    /// Where they are and how each goes.
    pub(super) fn states(&self) -> Vec<(Endpoint, watch::Receiver<listen::State>)> {
        self.open
            .iter()
            .map(|door| (door.listener.endpoint().clone(), door.listener.state()))
            .collect()
    }
}

impl Door {
    async fn close(self) -> JoinHandle<()> {
        self.listener.close().await;
        let _ = self.drain.send(true);
        self.connections
    }
}

impl Gate {
    fn open(&self, endpoint: Endpoint) -> Door {
        let host_proc = self.rules().host_proc;
        let (listener, incoming) = listen::open(endpoint.clone(), &host_proc);
        let (drain, drained) = watch::channel(false);
        let connections = tokio::spawn(self.clone().accept(endpoint, incoming, drained));
        Door {
            listener,
            drain,
            connections,
        }
    }

    async fn accept(
        self,
        endpoint: Endpoint,
        mut incoming: Incoming,
        drained: watch::Receiver<bool>,
    ) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                connection = incoming.next() => match connection {
                    Some(connection) => {
                        if self.admits(&endpoint, &connection.stream) {
                            let served = kms::serve(Arc::clone(&self.face), connection.stream, drained.clone());
                            connections.spawn(async move {
                                served.await;
                                drop(connection.share);
                            });
                        }
                    }
                    None => break,
                },
                Some(_) = connections.join_next() => {}
            }
        }
        while connections.join_next().await.is_some() {}
    }

    /// A peer that is refused is dropped without a byte and never learns why.
    fn admits(&self, endpoint: &Endpoint, stream: &UnixStream) -> bool {
        match peer::admit(stream, EndpointKind::of(endpoint), &self.rules()) {
            Ok(peer) => {
                tracing::info!(%endpoint, uid = peer.uid, pod = peer.pod_uid.as_deref().unwrap_or("not seen"), "admitted a peer");
                true
            }
            Err(refusal) => {
                self.face.counters.refuse_peer(refusal.label());
                self.complaints.say(endpoint, &refusal);
                false
            }
        }
    }

    fn rules(&self) -> Rules {
        self.rules
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
