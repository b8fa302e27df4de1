//! Which operation goes to the host when, which one is stuck, and which cannot finish in time.
//!
//! No I/O and no clock: `now` is an argument, so that every rule here can be tested by itself.
//!
//! *Expected flow:* [`Dispatch::admit`] → [`Dispatch::next`] / [`Dispatch::sent`] →
//! [`Dispatch::answer`]. The host's threads take packets in the order of sending, so an operation
//! is being worked on as soon as fewer than `sessions` earlier ones are unanswered; its time counts
//! from then, not from when it was queued in the kernel.

use std::collections::VecDeque;
use std::time::Duration;

use hsm_wire::host::{Answer, Request};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::error::TokenError;

/// Most operations that wait for a place in the host. At 10 ms each on the default 4 sessions they
/// take 2.6 s, and kube-apiserver's deadline is 3 s: a longer queue would hold only calls that
/// cannot be answered in time. Each is about 1 KiB, so the queue is bounded by 1 MiB.
pub(crate) const MAX_WAITING: usize = 1024;

/// Packets in the host per session thread: one that is worked on and one that is ready for when it
/// is done, so that no thread waits for a round trip to the daemon.
const PACKETS_PER_SESSION: usize = 2;

/// A service time within which an answer is worth being looked for.
const QUICK: Duration = Duration::from_micros(200);

/// Weight of the newest measurement in the mean of service times: 1/8, as TCP smooths its round
/// trips (RFC 6298).
const SMOOTHING: u32 = 8;

/// What a caller is told in the end.
pub(crate) type Reply = Result<Answer, TokenError>;

/// One operation of one caller.
pub(crate) struct Operation {
    pub(crate) id: u64,
    pub(crate) request: Request,
    pub(crate) deadline: Instant,
    /// It was with a host before that was lost over it or beside it.
    pub(crate) resent: bool,
    pub(crate) reply: oneshot::Sender<Reply>,
}

impl Operation {
    fn is_wanted(&self, now: Instant) -> bool {
        self.deadline > now && !self.reply.is_closed()
    }

    // Not one call of the module but some for each key.
    fn is_long(&self) -> bool {
        matches!(self.request, Request::Describe)
    }
}

/// How long the host may take to open or describe a token. It is more than one call: vendors'
/// libraries connect to every member of a group first, and each key is tried.
pub(crate) fn long_timeout(call_timeout: Duration) -> Duration {
    const CALLS: u32 = 5;
    const LEAST: Duration = Duration::from_secs(10);
    const MOST: Duration = Duration::from_secs(60);
    (call_timeout * CALLS).clamp(LEAST, MOST)
}

struct Flight {
    operation: Operation,
    /// When a session thread took it, as far as the order of sending tells.
    started: Option<Instant>,
    stuck: bool,
}

/// Why an operation is refused at once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overload {
    pub(crate) waiting: usize,
    pub(crate) expected: Duration,
}

/// What [`Dispatch::mark_stuck`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Stuck {
    /// Operations that were not stuck before.
    pub(crate) new: u64,
    /// Why the host is of no more use, if it is.
    pub(crate) hopeless: Option<String>,
}

/// Queue and flights of one token.
pub(crate) struct Dispatch {
    sessions: usize,
    call_timeout: Duration,
    waiting: VecDeque<Operation>,
    /// In the order of sending.
    flights: Vec<Flight>,
    service: Option<Duration>,
    last_answer: Option<Instant>,
}

impl Dispatch {
    pub(crate) fn new(sessions: u16, call_timeout: Duration) -> Self {
        let sessions = usize::from(sessions).max(1);
        Self {
            sessions,
            call_timeout,
            waiting: VecDeque::new(),
            flights: Vec::with_capacity(sessions * PACKETS_PER_SESSION),
            service: None,
            last_answer: None,
        }
    }

    /// Queues an operation, unless measured service times say that it cannot finish in time.
    ///
    /// Where a thread is free nothing is refused, whatever was measured: after one slow answer a
    /// refusal of everything would never measure a fast one again.
    pub(crate) fn admit(&mut self, operation: Operation, now: Instant) -> Result<(), Overload> {
        let waiting = self.waiting.len();
        let stuck = self.flights.iter().filter(|f| f.stuck).count();
        let threads = self.sessions.saturating_sub(stuck).max(1);
        let ahead = waiting + self.flights.len() - stuck;
        let rounds = u32::try_from(ahead / threads + 1).unwrap_or(u32::MAX);
        let expected = self.service.unwrap_or_default().saturating_mul(rounds);
        let late = ahead >= threads && now + expected > operation.deadline;
        if late || waiting >= MAX_WAITING {
            return Err(Overload {
                waiting: ahead,
                expected,
            });
        }
        self.waiting.push_back(operation);
        Ok(())
    }

    /// The operation to send now, if the host has room for one. Those that nobody waits for any
    /// more are dropped on the way.
    pub(crate) fn next(&mut self, now: Instant) -> Option<&Operation> {
        if self.flights.len() >= self.sessions * PACKETS_PER_SESSION {
            return None;
        }
        while self.waiting.front().is_some_and(|o| !o.is_wanted(now)) {
            self.waiting.pop_front();
        }
        self.waiting.front()
    }

    /// What [`Self::next`] gave is with the host.
    pub(crate) fn sent(&mut self, now: Instant) {
        if let Some(operation) = self.waiting.pop_front() {
            self.flights.push(Flight {
                operation,
                started: None,
                stuck: false,
            });
            self.start_flights(now);
        }
    }

    /// Takes out the operation that was answered; none has this id if the host made it up.
    pub(crate) fn answer(&mut self, id: u64, now: Instant) -> Option<Operation> {
        let at = self.flights.iter().position(|f| f.operation.id == id)?;
        let flight = self.flights.remove(at);
        if let Some(started) = flight.started
            && !flight.operation.is_long()
        {
            self.measure(now - started);
        }
        self.last_answer = Some(now);
        self.start_flights(now);
        Some(flight.operation)
    }

    /// How long to look for the answer to the one operation that is under way, instead of sleeping
    /// until it comes; none if it is not the only one or will take long.
    ///
    /// A software token answers within some 50 µs, and being woken costs as much again. Beside a
    /// network HSM it costs nothing, and nobody looks.
    pub(crate) fn worth_looking(&self) -> Option<Duration> {
        let alone = self.flights.len() == 1 && self.waiting.is_empty();
        let service = self.service.filter(|_| alone)?;
        (service <= QUICK).then_some(2 * service)
    }

    /// Puts an operation in front of all others: it has waited before.
    pub(crate) fn put_back(&mut self, operation: Operation) {
        self.waiting.push_front(operation);
    }

    /// Its caller is gone: frees its place in the queue. With the host it keeps its place, for the
    /// thread is busy all the same.
    pub(crate) fn abandon(&mut self, id: u64) {
        if let Some(at) = self.waiting.iter().rposition(|o| o.id == id) {
            self.waiting.remove(at);
        }
    }

    /// Looks for operations that a thread has had for longer than the call timeout.
    ///
    /// The host is hopeless when half of its threads are stuck, or when one is and nothing at all
    /// is answered for two call timeouts: with few callers a host that hangs as a whole would
    /// otherwise be found only after half as many callers have failed as it has threads.
    pub(crate) fn mark_stuck(&mut self, now: Instant) -> Stuck {
        let mut found = Stuck::default();
        let mut stuck = 0;
        for flight in &mut self.flights {
            let Some(started) = flight.started else {
                continue;
            };
            let limit = if flight.operation.is_long() {
                long_timeout(self.call_timeout)
            } else {
                self.call_timeout
            };
            let age = now - started;
            if age < limit {
                continue;
            }
            found.new += u64::from(!flight.stuck);
            flight.stuck = true;
            stuck += 1;
            let silent = now - self.last_answer.map_or(started, |at| at.max(started));
            if silent >= 2 * limit {
                found.hopeless = Some(format!(
                    "the module host answered nothing for {} ms",
                    silent.as_millis()
                ));
            }
        }
        if stuck > 0 && 2 * stuck >= self.sessions {
            found.hopeless = Some(format!(
                "{stuck} of {} sessions hang in the module for more than {} ms",
                self.sessions,
                self.call_timeout.as_millis()
            ));
        }
        found
    }

    /// The host is gone. What it had is queued in front to be sent once more, in the same order;
    /// given back is what was sent again before. Measurements do not outlive the host.
    pub(crate) fn host_lost(&mut self, now: Instant) -> Vec<Operation> {
        self.service = None;
        self.last_answer = None;
        let mut spent = Vec::new();
        for Flight { mut operation, .. } in self.flights.drain(..).rev() {
            if !operation.is_wanted(now) {
                continue;
            }
            if operation.resent {
                spent.push(operation);
            } else {
                operation.resent = true;
                self.waiting.push_front(operation);
            }
        }
        spent
    }

    /// Takes everything out that waits.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Operation> + '_ {
        self.waiting.drain(..)
    }

    fn start_flights(&mut self, now: Instant) {
        for flight in self.flights.iter_mut().take(self.sessions) {
            flight.started.get_or_insert(now);
        }
    }

    // A hang says nothing of how long a call takes, so one measurement counts at most as a timeout.
    fn measure(&mut self, took: Duration) {
        let took = took.min(self.call_timeout);
        self.service = Some(match self.service {
            Some(mean) => (mean * (SMOOTHING - 1) + took) / SMOOTHING,
            None => took,
        });
    }
}

#[cfg(test)]
mod tests {
    use hsm_wire::envelope::Wrap;
    use hsm_wire::host::KeyRef;
    use hsm_wire::identity::Fingerprint;

    use super::*;

    const CALL: Duration = Duration::from_secs(2);
    const MS: Duration = Duration::from_millis(1);

    struct Bench {
        dispatch: Dispatch,
        now: Instant,
        last_id: u64,
        callers: Vec<oneshot::Receiver<Reply>>,
    }

    fn probe() -> Request {
        let fingerprint = Fingerprint([0; 32]);
        let key = KeyRef {
            id: Vec::new(),
            label: String::new(),
            fingerprint,
        };
        Request::Probe {
            key,
            wrap: Wrap::AES_GCM,
        }
    }

    impl Bench {
        fn new(sessions: u16) -> Self {
            Self {
                dispatch: Dispatch::new(sessions, CALL),
                now: Instant::now(),
                last_id: 0,
                callers: Vec::new(),
            }
        }

        fn admit(&mut self, within: Duration) -> Result<u64, Overload> {
            let (reply, caller) = oneshot::channel();
            self.last_id += 1;
            let operation = Operation {
                id: self.last_id,
                request: probe(),
                deadline: self.now + within,
                resent: false,
                reply,
            };
            self.dispatch.admit(operation, self.now)?;
            self.callers.push(caller);
            Ok(self.last_id)
        }

        fn send_all(&mut self) -> Vec<u64> {
            let mut ids = Vec::new();
            while let Some(operation) = self.dispatch.next(self.now) {
                ids.push(operation.id);
                self.dispatch.sent(self.now);
            }
            ids
        }
    }

    #[test]
    fn two_packets_per_session_are_with_the_host_and_the_rest_waits_in_order() {
        let mut b = Bench::new(2);
        for _ in 0..6 {
            b.admit(CALL).unwrap();
        }
        assert_eq!(b.send_all(), [1, 2, 3, 4]);
        assert!(b.dispatch.answer(2, b.now).is_some());
        assert_eq!(b.send_all(), [5]);
    }

    #[test]
    fn an_answer_to_nothing_is_seen() {
        let mut b = Bench::new(1);
        b.admit(CALL).unwrap();
        b.send_all();
        assert!(b.dispatch.answer(7, b.now).is_none());
        assert!(b.dispatch.answer(1, b.now).is_some());
        assert!(b.dispatch.answer(1, b.now).is_none());
    }

    #[test]
    fn nothing_is_refused_before_anything_was_measured() {
        let mut b = Bench::new(1);
        for _ in 0..MAX_WAITING {
            b.admit(MS).unwrap();
        }
        assert!(b.admit(CALL).is_err(), "the queue is bounded all the same");
    }

    #[test]
    fn only_what_cannot_finish_by_its_deadline_is_refused() {
        let mut b = Bench::new(2);
        b.admit(CALL).unwrap();
        b.send_all();
        b.now += 100 * MS;
        b.dispatch.answer(1, b.now);
        for _ in 0..10 {
            b.admit(CALL).unwrap();
        }
        // Ten before it on two threads at 100 ms each: 600 ms.
        assert_eq!(
            b.admit(599 * MS),
            Err(Overload {
                waiting: 10,
                expected: 600 * MS
            })
        );
        assert!(b.admit(600 * MS).is_ok());
    }

    #[test]
    fn a_free_thread_refuses_nothing_however_slow_the_last_answer_was() {
        let mut b = Bench::new(1);
        b.admit(CALL).unwrap();
        b.send_all();
        b.now += 60 * CALL;
        b.dispatch.answer(1, b.now);
        assert!(b.admit(MS).is_ok());
    }

    #[test]
    fn a_caller_that_went_away_frees_its_place() {
        let mut b = Bench::new(1);
        for _ in 0..4 {
            b.admit(CALL).unwrap();
        }
        assert_eq!(b.send_all(), [1, 2]);
        b.dispatch.abandon(3);
        b.dispatch.answer(1, b.now);
        assert_eq!(b.send_all(), [4]);
    }

    #[test]
    fn what_nobody_waits_for_is_not_sent() {
        let mut b = Bench::new(4);
        b.admit(MS).unwrap();
        b.admit(CALL).unwrap();
        b.admit(CALL).unwrap();
        b.callers.remove(1);
        b.now += 2 * MS;
        assert_eq!(b.send_all(), [3]);
    }

    #[test]
    fn time_in_the_queue_of_the_kernel_is_not_time_in_the_module() {
        let mut b = Bench::new(1);
        b.admit(60 * CALL).unwrap();
        b.admit(60 * CALL).unwrap();
        b.send_all();
        b.now += CALL - MS;
        b.dispatch.answer(1, b.now);
        b.now += CALL - MS;
        assert_eq!(b.dispatch.mark_stuck(b.now), Stuck::default());
        b.now += MS;
        assert_eq!(b.dispatch.mark_stuck(b.now).new, 1);
    }

    /// What is found when so many of the sessions hang and the others have answered.
    fn found_when_hanging(sessions: u16, hanging: u16) -> Stuck {
        let mut b = Bench::new(sessions);
        for _ in 0..sessions {
            b.admit(60 * CALL).unwrap();
        }
        let ids = b.send_all();
        b.now += MS;
        for id in &ids[usize::from(hanging)..] {
            b.dispatch.answer(*id, b.now);
        }
        b.now += CALL;
        b.dispatch.mark_stuck(b.now)
    }

    #[test]
    fn half_of_the_sessions_stuck_make_the_host_hopeless() {
        for (sessions, half) in [(1, 1), (2, 1), (3, 2), (4, 2), (64, 32)] {
            let found = found_when_hanging(sessions, half);
            assert_eq!(found.new, u64::from(half));
            assert!(found.hopeless.is_some(), "{half} of {sessions}");
            let fewer = half - 1;
            let found = found_when_hanging(sessions, fewer);
            assert_eq!(
                found,
                Stuck {
                    new: u64::from(fewer),
                    hopeless: None
                }
            );
        }
    }

    #[test]
    fn a_host_that_answers_nothing_at_all_is_hopeless_with_one_caller() {
        let mut b = Bench::new(8);
        b.admit(60 * CALL).unwrap();
        b.send_all();
        b.now += CALL;
        assert_eq!(
            b.dispatch.mark_stuck(b.now),
            Stuck {
                new: 1,
                hopeless: None
            }
        );
        b.now += CALL;
        assert!(b.dispatch.mark_stuck(b.now).hopeless.is_some());
    }

    #[test]
    fn one_hanging_call_costs_no_host_while_others_are_answered() {
        let mut b = Bench::new(8);
        b.admit(60 * CALL).unwrap();
        b.send_all();
        let mut new = 0;
        for _ in 0..10 {
            let id = b.admit(CALL).unwrap();
            b.send_all();
            b.now += CALL - MS;
            b.dispatch.answer(id, b.now);
            b.now += MS;
            let found = b.dispatch.mark_stuck(b.now);
            new += found.new;
            assert_eq!(found.hopeless, None);
        }
        assert_eq!(new, 1, "it is counted once");
        b.now += 2 * CALL;
        assert!(b.dispatch.mark_stuck(b.now).hopeless.is_some());
    }

    #[test]
    fn what_a_lost_host_had_is_sent_once_more_and_before_all_others() {
        let mut b = Bench::new(1);
        for _ in 0..3 {
            b.admit(60 * CALL).unwrap();
        }
        assert_eq!(b.send_all(), [1, 2]);
        assert!(b.dispatch.host_lost(b.now).is_empty());
        assert_eq!(b.send_all(), [1, 2]);
        let spent: Vec<u64> = b.dispatch.host_lost(b.now).iter().map(|o| o.id).collect();
        assert_eq!(spent, [2, 1]);
        assert_eq!(b.send_all(), [3]);
    }

    #[test]
    fn a_lost_host_takes_with_it_what_nobody_waits_for() {
        let mut b = Bench::new(1);
        b.admit(CALL).unwrap();
        b.admit(MS).unwrap();
        b.send_all();
        b.now += 2 * MS;
        b.callers.remove(0);
        assert!(b.dispatch.host_lost(b.now).is_empty());
        assert!(b.send_all().is_empty());
    }
}
