//! A scripted worker: a real tonic server on its own runtime, so that killing it closes its sockets like
//! the death of a process.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
};

use cadre_proto::v1::{self, decode_event::Event, prefill_event, worker_server};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

/// What a decode stream does after its `Reserved`.
#[derive(Clone, Debug)]
pub enum Step {
    /// A token at the next position.
    Token(u32),
    /// A token with log-probabilities.
    Scored(u32, f32, Vec<(u32, f32)>),
    /// A token at a wrong position.
    Misplaced(u32),
    /// Waits until the test lets one stream pass.
    Gate(Arc<Semaphore>),
    /// Ends well.
    Finish(v1::FinishReason),
    /// Ends with a status.
    Fail(Status),
    /// Ends without a finish reason.
    End,
    /// Says nothing more.
    Hang,
}

/// What a worker does with requests.
#[derive(Clone, Debug)]
pub struct Script {
    /// Answer to the reservation; `None` never answers.
    pub reserve: Option<Result<(), Status>>,
    /// Answer to Prefill; `None` never answers.
    pub prefill: Option<Result<(), Status>>,
    /// After `Reserved`.
    pub steps: Vec<Step>,
}

impl Script {
    pub fn steps(steps: Vec<Step>) -> Self {
        Self { reserve: Some(Ok(())), prefill: Some(Ok(())), steps }
    }

    /// Some tokens, then the end.
    pub fn tokens(tokens: &[u32], reason: v1::FinishReason) -> Self {
        let tokens = tokens.iter().map(|&token| Step::Token(token));
        Self::steps(tokens.chain([Step::Finish(reason)]).collect())
    }

    pub fn refusing(status: Status) -> Self {
        Self { reserve: Some(Err(status)), ..Self::steps(Vec::new()) }
    }
}

/// What a worker has seen.
#[derive(Debug, Default)]
pub struct Seen {
    pub decodes: Mutex<Vec<v1::DecodeRequest>>,
    pub prefills: Mutex<Vec<v1::PrefillRequest>>,
    /// Prefill calls so far.
    pub prefilled: watch::Sender<usize>,
    /// Decode streams begun.
    pub begun: watch::Sender<usize>,
    /// Decode streams open now.
    pub open: watch::Sender<usize>,
}

impl Seen {
    /// Waits until so many decode streams are open.
    pub async fn open(&self, count: usize) {
        self.open.subscribe().wait_for(|open| *open == count).await.unwrap();
    }

    /// Waits until so many decode streams have begun.
    pub async fn begun(&self, count: usize) {
        self.begun.subscribe().wait_for(|begun| *begun >= count).await.unwrap();
    }

    /// Waits until so many prefill calls have come.
    pub async fn prefilled(&self, count: usize) {
        self.prefilled.subscribe().wait_for(|prefilled| *prefilled >= count).await.unwrap();
    }

    pub fn decode(&self, at: usize) -> v1::DecodeRequest {
        self.decodes.lock().unwrap()[at].clone()
    }
}

/// A running worker.
pub struct FakeWorker {
    pub address: SocketAddr,
    pub seen: Arc<Seen>,
    script: Arc<Mutex<Script>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl FakeWorker {
    pub async fn start(script: Script) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (seen, script) = (Arc::<Seen>::default(), Arc::new(Mutex::new(script)));
        let service = Service { seen: Arc::clone(&seen), script: Arc::clone(&script) };
        let started = runtime.spawn(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let server = tonic::transport::Server::builder()
                .add_service(worker_server::WorkerServer::new(service))
                .serve_with_incoming(TcpIncoming::from(listener));
            tokio::spawn(server);
            address
        });
        let address = started.await.unwrap();
        Self { address, seen, script, runtime: Some(runtime) }
    }

    pub fn set(&self, script: Script) {
        *self.script.lock().unwrap() = script;
    }

    /// Closes every socket at once.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for FakeWorker {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Service {
    seen: Arc<Seen>,
    script: Arc<Mutex<Script>>,
}

/// Counts a stream as open until it is dropped.
struct Open(Arc<Seen>);

impl Open {
    fn new(seen: &Arc<Seen>) -> Self {
        seen.open.send_modify(|open| *open += 1);
        seen.begun.send_modify(|begun| *begun += 1);
        Self(Arc::clone(seen))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl worker_server::Worker for Service {
    type DecodeStream = Events<v1::DecodeEvent>;
    type PrefillStream = Events<v1::PrefillEvent>;

    async fn decode(
        &self,
        request: Request<v1::DecodeRequest>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let request = request.into_inner();
        let script = self.script.lock().unwrap().clone();
        let mut position = request.prompt.len() as u32;
        self.seen.decodes.lock().unwrap().push(request);
        let open = Open::new(&self.seen);
        match script.reserve {
            None => std::future::pending::<()>().await,
            Some(Err(status)) => return Err(status),
            Some(Ok(())) => {}
        }
        let event = |event| Ok(v1::DecodeEvent { event: Some(event) });
        let token = |position, token| v1::GeneratedToken { position, token, logprob: None, top: Vec::new() };
        Ok(Response::new(Box::pin(async_stream::stream! {
            let _open = open;
            yield event(Event::Reserved(v1::Reserved {}));
            for step in script.steps {
                match step {
                    Step::Token(id) => {
                        yield event(Event::Token(token(position, id)));
                        position += 1;
                    }
                    Step::Scored(id, logprob, top) => {
                        let top = top.into_iter().map(|(token, logprob)| v1::TokenLogprob { token, logprob });
                        let scored = v1::GeneratedToken {
                            logprob: Some(logprob),
                            top: top.collect(),
                            ..token(position, id)
                        };
                        yield event(Event::Token(scored));
                        position += 1;
                    }
                    Step::Misplaced(id) => yield event(Event::Token(token(position + 1, id))),
                    Step::Gate(gate) => gate.acquire().await.unwrap().forget(),
                    Step::Finish(reason) => {
                        yield event(Event::Finished(v1::Finished { reason: reason.into() }));
                        return;
                    }
                    Step::Fail(status) => {
                        yield Err(status);
                        return;
                    }
                    Step::End => return,
                    Step::Hang => std::future::pending::<()>().await,
                }
            }
        })))
    }

    async fn prefill(
        &self,
        request: Request<v1::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let request = request.into_inner();
        let script = self.script.lock().unwrap().clone();
        let computed = request.prompt.len() as u32;
        self.seen.prefills.lock().unwrap().push(request);
        self.seen.prefilled.send_modify(|prefilled| *prefilled += 1);
        match script.prefill {
            None => std::future::pending::<()>().await,
            Some(Err(status)) => return Err(status),
            Some(Ok(())) => {}
        }
        let event = |event| Ok(v1::PrefillEvent { event: Some(event) });
        let handed_off = v1::HandedOff { first_token: 0, kv_bytes: 1 };
        Ok(Response::new(Box::pin(tokio_stream::iter([
            event(prefill_event::Event::ComputedTokens(computed)),
            event(prefill_event::Event::HandedOff(handed_off)),
        ]))))
    }

    async fn receive_kv(
        &self,
        _request: Request<Streaming<v1::KvFrame>>,
    ) -> Result<Response<v1::KvReceipt>, Status> {
        Err(Status::unimplemented("scripted workers hand nothing off"))
    }
}
