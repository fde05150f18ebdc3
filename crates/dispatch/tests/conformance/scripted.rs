//! A shard whose behaviour a test scripts. Its "experts" are a byte function, so that any mix-up of rows,
//! scales, experts or order changes the result.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use cadre_dispatch::{
    Answer, CombineFrame, DispatchFrame, Refusal, RefusalCode, Reply, ShardContract, ShardService,
    ShardSignals,
};
use cadre_ops::RowFormat;
use cadre_types::{LogicalExpert, NumericsClass, Placement, ShardIndex};
use parking_lot::{Condvar, Mutex};

/// No condition of a test takes longer, or it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What a scripted expert makes of a row.
pub(crate) fn compute(row: &[u8], scales: &[u8], expert: u16, out_len: usize) -> Vec<u8> {
    let mut state = 0x9E37_u32.wrapping_mul(u32::from(expert) + 1);
    for byte in row.iter().chain(scales) {
        state = state.rotate_left(5) ^ u32::from(*byte).wrapping_mul(0x0100_0193);
    }
    (0..out_len)
        .map(|at| {
            let byte = row.get(at % row.len().max(1)).copied().unwrap_or(0);
            let byte = (state.rotate_left(at as u32 % 32) as u8) ^ byte.wrapping_add(at as u8);
            // The last byte of an element, F32 or bf16, keeps its exponent below all ones: rows are finite.
            if at % 2 == 1 { byte & !0x40 } else { byte }
        })
        .collect()
}

/// What a shard does with frames that pass its contract.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mode {
    Compute,
    /// Refuses this many frames, then computes. Probes do not count and pass.
    Refuse(RefusalCode, usize),
    /// Keeps everything, probes too, until the mode changes.
    Hold,
    /// Answers with too few bytes.
    ShortAnswer,
    /// Drops frames without an answer.
    Drop,
    /// Answers infinity in the last element of every frame with rows, probes too.
    NotFinite,
}

struct State {
    mode: Mode,
    contract: ShardContract,
    placement: Arc<Placement>,
    held: VecDeque<(DispatchFrame, Reply)>,
    frames: usize,
}

pub(crate) struct Scripted {
    state: Mutex<State>,
    changed: Condvar,
}

impl Scripted {
    pub(crate) fn new(contract: ShardContract, placement: Arc<Placement>) -> Arc<Self> {
        let state = State { mode: Mode::Compute, contract, placement, held: VecDeque::new(), frames: 0 };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.state.lock().mode = mode;
    }

    pub(crate) fn contract(&self, change: impl FnOnce(&mut ShardContract)) {
        change(&mut self.state.lock().contract);
    }

    /// Frames with pairs that arrived.
    pub(crate) fn frames(&self) -> usize {
        self.state.lock().frames
    }

    /// Waits until frames with pairs are held.
    pub(crate) fn wait_held(&self, count: usize) {
        self.wait(|state| state.held.iter().filter(|held| held.0.pairs() > 0).count() >= count);
    }

    pub(crate) fn wait_frames(&self, count: usize) {
        self.wait(|state| state.frames >= count);
    }

    fn wait(&self, condition: impl Fn(&State) -> bool) {
        let mut state = self.state.lock();
        let deadline = Instant::now() + PATIENCE;
        while !condition(&state) {
            let late = self.changed.wait_until(&mut state, deadline).timed_out();
            assert!(!late, "the condition never came true");
        }
    }

    /// Computes what is held, changed by `tamper`, and from now on everything at once.
    pub(crate) fn release(&self, tamper: impl Fn(&mut Vec<u8>)) {
        let (held, placement, contract) = {
            let mut state = self.state.lock();
            state.mode = Mode::Compute;
            (std::mem::take(&mut state.held), state.placement.clone(), state.contract.clone())
        };
        for (frame, reply) in held {
            reply.send(answer(&contract, &placement, &frame, &tamper));
        }
    }

    /// Loses what is held, as a dying process does.
    pub(crate) fn lose(&self) {
        let held = std::mem::take(&mut self.state.lock().held);
        drop(held);
    }
}

fn answer(
    contract: &ShardContract,
    placement: &Placement,
    frame: &DispatchFrame,
    tamper: impl Fn(&mut Vec<u8>),
) -> Answer {
    let format = RowFormat::combine(contract.generation.numerics);
    let width = frame.format.row_bytes(contract.hidden);
    let scale_width = 4 * frame.format.row_scales(contract.hidden);
    let experts: &[LogicalExpert] =
        placement.layer(frame.layer).map_or(&[], |layer| &layer.slots[contract.shard.index()]);
    let mut rows = Vec::new();
    for (&token, &slot) in frame.pair_tokens.iter().zip(&frame.pair_slots) {
        let token = token as usize;
        rows.extend(compute(
            &frame.data[token * width..(token + 1) * width],
            &frame.scales[token * scale_width..(token + 1) * scale_width],
            experts[slot as usize].0,
            format.row_bytes(contract.hidden),
        ));
    }
    tamper(&mut rows);
    // As if experts were so slow that no jitter of the test's machine matters beside them.
    let compute_micros = 10_000 * frame.pairs() as u32;
    Ok(CombineFrame {
        format,
        rows: rows.into(),
        signals: ShardSignals { compute_micros, ..ShardSignals::default() },
    })
}

impl ShardService for Scripted {
    fn submit(&self, frame: DispatchFrame, reply: Reply) {
        let mut state = self.state.lock();
        if let Err(refusal) = state.contract.check(&frame) {
            drop(state);
            reply.send(Err(refusal.into()));
            return;
        }
        let real = frame.pairs() > 0;
        state.frames += usize::from(real);
        self.changed.notify_all();
        let (placement, contract) = (state.placement.clone(), state.contract.clone());
        let answer = match state.mode {
            Mode::Hold => {
                state.held.push_back((frame, reply));
                return;
            }
            Mode::Drop if real => return,
            Mode::Refuse(code, left) if real => {
                state.mode = if left > 1 { Mode::Refuse(code, left - 1) } else { Mode::Compute };
                let words = format!("{} says no", contract.shard);
                Err(Refusal::new(code, words).into())
            }
            Mode::ShortAnswer if real => {
                answer(&contract, &placement, &frame, |rows| rows.truncate(rows.len() - 1))
            }
            // 0x7F80 at the end of a row: infinity in F32 and in bf16.
            Mode::NotFinite if real => answer(&contract, &placement, &frame, |rows| {
                let end = rows.len();
                rows[end - 2..].copy_from_slice(&[0x80, 0x7F]);
                if contract.generation.numerics == NumericsClass::F32 {
                    rows[end - 4..end - 2].fill(0);
                }
            }),
            Mode::Compute | Mode::Drop | Mode::Refuse(..) | Mode::ShortAnswer | Mode::NotFinite => {
                answer(&contract, &placement, &frame, |_| {})
            }
        };
        drop(state);
        reply.send(answer);
    }
}

pub(crate) fn shard_name(shard: ShardIndex) -> String {
    format!("shard-{}", shard.0)
}
