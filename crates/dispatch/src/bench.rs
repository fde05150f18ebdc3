//! `cadre bench dispatch`: the round trip of the real dispatch path (dispatcher, gRPC link, server, queue and
//! compute thread) to a shard whose experts are the identity, beside a raw length-prefixed TCP echo of the same
//! bytes in the same run. Both sides of the path wait as workers and shards do (`transport::io`); the echo waits
//! as any tokio program does.
//!
//! Both directions carry the payload. The two are measured in alternating blocks, so that whatever else
//! the machine does falls on both.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use cadre_ops::{DispatchBatch, EncodedRows, ExchangeError, ExpertExchange, ExpertRows, RowFormat};
use cadre_types::{
    ClusterView, Generation, LayerId, LayerPlacement, LogicalExpert, Member, MemberId, MemberState,
    ModelHash, NumericsClass, Placement, PlacementEpoch, PlacementError, Role, ShardIndex,
};
use crossbeam_channel::TryRecvError;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime,
    sync::Notify,
};

use crate::{
    CombineFrame, DispatchConfig, DispatchFrame, Dispatcher, Drive, Driver, ExpertServer, GrpcConnector,
    IoHandle, IoThread, Reply, ShardService, ShardSignals, transport::MAX_LINK_FRAMES, tuning,
};

/// Bytes of a token of DeepSeek-V3 in e4m3: payloads that are multiples travel as that many tokens.
const TOKEN_BYTES: usize = 7168;

/// Exchanges of one kind before it is the other's turn.
const BLOCK: usize = 50;

/// How long the shard's thread waits before it looks whether the bench is over.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// One line of the table. Times are in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundTripRow {
    /// Bytes each way.
    pub payload_bytes: usize,
    /// Median of the dispatch path.
    pub dispatch_p50: f64,
    /// 99th percentile of the dispatch path.
    pub dispatch_p99: f64,
    /// Median of the raw echo.
    pub raw_p50: f64,
    /// 99th percentile of the raw echo.
    pub raw_p99: f64,
}

impl RoundTripRow {
    /// Median of the dispatch path over the median of the raw echo.
    pub fn ratio(&self) -> f64 {
        self.dispatch_p50 / self.raw_p50
    }
}

/// Why a bench did not finish.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A socket or thread could not be had.
    #[error("bench dispatch: {0}")]
    Io(#[from] io::Error),
    /// The exchange failed.
    #[error("bench dispatch: {0}")]
    Exchange(#[from] ExchangeError),
    /// The bench's own placement is wrong.
    #[error("bench dispatch: {0}")]
    Placement(#[from] PlacementError),
    /// What came back is not what was sent.
    #[error("bench dispatch: the echo of {payload_bytes} bytes differs")]
    Echo {
        /// Payload at which it happened.
        payload_bytes: usize,
    },
    /// Nothing to measure.
    #[error("bench dispatch: {0} bytes is no payload: give a positive multiple of 4")]
    Payload(usize),
}

/// A shard that answers each frame with its own rows, from a thread that waits for frames as a shard's compute
/// thread does.
struct Echo {
    frames: crossbeam_channel::Sender<(DispatchFrame, Reply)>,
    arrived: Arc<Notify>,
}

impl Echo {
    /// The thread ends with the service.
    fn start(io: IoHandle) -> io::Result<Self> {
        let (frames, waiting) = crossbeam_channel::bounded::<(DispatchFrame, Reply)>(MAX_LINK_FRAMES);
        let arrived = Arc::new(Notify::new());
        let event = arrived.clone();
        thread::Builder::new().name("bench-compute".to_owned()).spawn(move || {
            let driver = Driver::new(io);
            loop {
                match waiting.try_recv() {
                    Ok((frame, reply)) => {
                        let (bytes, rows) = (frame.data.len(), frame.data);
                        let signals = ShardSignals::default();
                        let mut answer =
                            Some((reply, CombineFrame { format: RowFormat::F32, rows, signals }));
                        driver.flush(bytes, &mut || {
                            if let Some((reply, rows)) = answer.take() {
                                reply.send(Ok(rows));
                            }
                        });
                    }
                    Err(TryRecvError::Empty) => {
                        driver.wait(&event, Instant::now() + LOOK_AGAIN);
                    }
                    Err(TryRecvError::Disconnected) => return,
                }
            }
        })?;
        Ok(Self { frames, arrived })
    }
}

impl ShardService for Echo {
    fn submit(&self, frame: DispatchFrame, reply: Reply) {
        // A frame that finds the queue full answers itself as dropped.
        drop(self.frames.try_send((frame, reply)));
        self.arrived.notify_one();
    }
}

/// Measures round trips of each payload, `iterations` of each kind. `progress` is called with exchanges done
/// and exchanges in all.
pub fn dispatch_round_trip(
    payloads: &[usize],
    iterations: usize,
    mut progress: impl FnMut(usize, usize),
) -> Result<Vec<RoundTripRow>, BenchError> {
    let server = IoThread::start("bench-shard")?;
    let links = IoThread::start("bench-links")?;
    let mut dispatch = DispatchEcho::start(&server, &links)?;
    let mut raw = RawEcho::start()?;
    let total = payloads.len() * iterations * 2;
    let mut rows = Vec::with_capacity(payloads.len());
    for (at, &bytes) in payloads.iter().enumerate() {
        if bytes == 0 || !bytes.is_multiple_of(4) {
            return Err(BenchError::Payload(bytes));
        }
        // Rows of finite values, whatever the bytes: bit 6 keeps their exponents below all ones.
        let payload: Bytes = (0..bytes).map(|at| (at * 131 % 251) as u8 & 0xBF).collect();
        let (mut dispatched, mut echoed) = (Vec::new(), Vec::new());
        for _ in 0..BLOCK {
            dispatch.round_trip(&payload)?;
            raw.round_trip(&payload)?;
        }
        while dispatched.len() < iterations {
            for _ in 0..BLOCK.min(iterations - dispatched.len()) {
                dispatched.push(dispatch.round_trip(&payload)?);
            }
            for _ in 0..BLOCK.min(iterations - echoed.len()) {
                echoed.push(raw.round_trip(&payload)?);
            }
            progress(at * iterations * 2 + dispatched.len() + echoed.len(), total);
        }
        let (dispatch_p50, dispatch_p99) = percentiles(&mut dispatched);
        let (raw_p50, raw_p99) = percentiles(&mut echoed);
        rows.push(RoundTripRow { payload_bytes: bytes, dispatch_p50, dispatch_p99, raw_p50, raw_p99 });
    }
    Ok(rows)
}

/// Median and 99th percentile in microseconds.
fn percentiles(samples: &mut [Duration]) -> (f64, f64) {
    samples.sort_unstable();
    let at = |percent: usize| {
        let index = (samples.len() * percent / 100).min(samples.len().saturating_sub(1));
        samples.get(index).map_or(0.0, |sample| sample.as_secs_f64() * 1e6)
    };
    (at(50), at(99))
}

struct DispatchEcho {
    dispatcher: Dispatcher,
    out: ExpertRows,
    choices: Vec<u16>,
}

impl DispatchEcho {
    fn start(server: &IoThread, links: &IoThread) -> Result<Self, BenchError> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let echo = Arc::new(Echo::start(server.handle())?);
        server.handle().runtime().spawn(async move {
            let listener = match TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(error) => return tracing::error!(%error, "bench listener"),
            };
            let service = ExpertServer::new(echo).into_service();
            let serving = tuning::server().add_service(service);
            if let Err(error) = serving.serve_with_incoming(tuning::incoming(listener)).await {
                tracing::error!(%error, "bench server");
            }
        });
        let generation = Generation {
            model: ModelHash::default(),
            numerics: NumericsClass::F32,
            epoch: PlacementEpoch(1),
        };
        let slots = vec![vec![LogicalExpert(0)]];
        let layers = vec![LayerPlacement { layer: LayerId(0), slots }];
        let echo = Member {
            id: MemberId("echo".to_owned()),
            role: Role::Expert(ShardIndex(0)),
            address: address.to_string(),
            state: MemberState::Ready,
            pod: None,
        };
        let placement = Arc::new(Placement::new(PlacementEpoch(1), 1, layers)?);
        let view = ClusterView::settled(generation, placement, vec![echo]);
        let connector = Arc::new(GrpcConnector::new(links.handle()));
        let dispatcher = Dispatcher::new(DispatchConfig::default(), generation, connector);
        dispatcher.handle().update(Arc::new(view));
        Ok(Self { dispatcher, out: ExpertRows::default(), choices: Vec::new() })
    }

    fn round_trip(&mut self, payload: &Bytes) -> Result<Duration, BenchError> {
        let tokens = if payload.len().is_multiple_of(TOKEN_BYTES) { payload.len() / TOKEN_BYTES } else { 1 };
        self.choices.resize(tokens, 0);
        let batch = DispatchBatch {
            layer: LayerId(0),
            activations: &EncodedRows {
                format: RowFormat::F32,
                rows: tokens,
                cols: payload.len() / tokens / 4,
                data: payload.clone(),
                scales: Bytes::new(),
            },
            top_k: 1,
            topk_idx: &self.choices,
        };
        let start = Instant::now();
        let ticket = self.dispatcher.dispatch(batch)?;
        self.dispatcher.combine(ticket, &mut self.out)?;
        let took = start.elapsed();
        if self.out.in_order() != *payload {
            return Err(BenchError::Echo { payload_bytes: payload.len() });
        }
        Ok(took)
    }
}

struct RawEcho {
    runtime: runtime::Runtime,
    stream: TcpStream,
    back: Vec<u8>,
    _server: IoThread,
}

impl RawEcho {
    fn start() -> Result<Self, BenchError> {
        let server = IoThread::start("bench-raw")?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        server.handle().runtime().spawn(async move {
            if let Err(error) = echo(listener).await {
                tracing::debug!(%error, "raw echo ended");
            }
        });
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let stream = runtime.block_on(connect(address))?;
        Ok(Self { runtime, stream, back: Vec::new(), _server: server })
    }

    fn round_trip(&mut self, payload: &[u8]) -> Result<Duration, BenchError> {
        let start = Instant::now();
        self.runtime.block_on(async {
            write_framed(&mut self.stream, payload).await?;
            read_framed(&mut self.stream, &mut self.back).await
        })?;
        let took = start.elapsed();
        if self.back != *payload {
            return Err(BenchError::Echo { payload_bytes: payload.len() });
        }
        Ok(took)
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn echo(listener: std::net::TcpListener) -> io::Result<()> {
    let (mut stream, _) = TcpListener::from_std(listener)?.accept().await?;
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    loop {
        read_framed(&mut stream, &mut buffer).await?;
        write_framed(&mut stream, &buffer).await?;
    }
}

async fn write_framed(stream: &mut TcpStream, payload: &[u8]) -> io::Result<()> {
    let len = u32::try_from(payload.len()).map_err(io::Error::other)?;
    // The length goes with the first segment: one write for it would cost a packet under TCP_NODELAY.
    let header = len.to_le_bytes();
    let mut slices = [io::IoSlice::new(&header), io::IoSlice::new(payload)];
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        let written = stream.write_vectored(rest).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        io::IoSlice::advance_slices(&mut rest, written);
    }
    Ok(())
}

async fn read_framed(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
    let len = stream.read_u32_le().await?;
    buffer.resize(len as usize, 0);
    stream.read_exact(buffer).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn echoes_every_payload_and_measures_both_ways() {
        let mut last = (0, 0);
        let payloads = [4, TOKEN_BYTES, 3 * TOKEN_BYTES, 1 << 20];
        let rows = dispatch_round_trip(&payloads, 3, |done, total| last = (done, total)).unwrap();
        assert_eq!(rows.iter().map(|row| row.payload_bytes).collect::<Vec<_>>(), payloads);
        assert!(rows.iter().all(|row| row.dispatch_p50 > 0.0 && row.raw_p99 >= row.raw_p50));
        assert_eq!(last, (24, 24));
    }

    #[test]
    fn a_payload_of_no_rows_is_refused() {
        let error = dispatch_round_trip(&[6], 1, |_, _| {}).unwrap_err();
        assert!(matches!(error, BenchError::Payload(6)));
    }

    #[test]
    fn percentiles_are_of_the_sorted_samples() {
        let mut samples: Vec<_> = (0..100).rev().map(Duration::from_micros).collect();
        assert_eq!(percentiles(&mut samples), (50.0, 99.0));
        assert_eq!(percentiles(&mut []), (0.0, 0.0));
    }
}
