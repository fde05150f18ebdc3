//! Steps, passes and routings on the device.

use std::sync::Arc;

use cadre_ops::{
    AttentionForm, KvLayout, OpsError, PassInfo, PassLimits, PassRows, RowGroup, StepInfo, StepRows,
    StepSegment, check, step::check_pass,
};

use super::queue::CudaQueue;
use crate::device::{Device, Event, Memory, Pinned};

/// Rows of one task of a product (kernels/product.cu).
pub(crate) const TASK_ROWS: usize = 8;

/// Words in pinned memory and on the device: written by the host at once, copied by the stream.
#[derive(Debug)]
struct Words {
    host: Pinned,
    device: Memory,
    /// The last copy; the host may not write before it is done.
    copied: Option<Event>,
}

impl Words {
    fn new(device: &Arc<Device>, op: &'static str, words: usize) -> Result<Self, OpsError> {
        let bytes = check::product(op, words.max(1), 4)?;
        Ok(Self {
            host: Pinned::new(device, op, bytes)?,
            device: Memory::new(device, op, bytes)?,
            copied: None,
        })
    }

    fn put(&mut self, op: &'static str, queue: &mut CudaQueue, words: &[u32]) -> Result<(), OpsError> {
        if let Some(event) = self.copied.take() {
            event.wait(op)?;
        }
        let bytes = size_of_val(words);
        if bytes > self.device.bytes() {
            *self = Self::new(queue.stream.device(), op, words.len().next_power_of_two())?;
        }
        let host = &mut self.host.as_mut_slice()[..bytes];
        for (to, word) in host.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        queue.stream.upload(op, &self.host.as_slice()[..bytes], self.device.address())?;
        self.copied = Some(queue.stream.record(op)?);
        Ok(())
    }

    fn at(&self, word: usize) -> u64 {
        self.device.at(4 * word)
    }
}

/// A step on the device.
#[derive(Debug)]
pub struct Step {
    info: StepInfo,
    capacity: usize,
    words: Words,
    /// First words of the lists.
    lists: Lists,
    /// Segments in naive form.
    naive: Vec<Naive>,
    /// Consecutive rows in absorbed form, in batches.
    runs: Vec<Run>,
    scratch: Vec<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Lists {
    positions: usize,
    places: usize,
    tables: usize,
    table_of: usize,
    wanted: usize,
    absorbed: usize,
    absorbed_rows: usize,
    pages: usize,
    /// Pages between the tables of two segments.
    stride: usize,
}

/// A segment in naive form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Naive {
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
    pub(crate) first_position: usize,
    /// First of its pages in the step's list.
    pub(crate) table: usize,
}

/// Consecutive rows in absorbed form.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) first_row: usize,
    /// Keys of each row.
    pub(crate) keys: Vec<usize>,
}

/// Rows of a run at most: what shares scratch memory.
pub(crate) const RUN_ROWS: usize = 128;

/// Words of a step of so many rows, block tables aside.
fn step_words(rows: usize) -> usize {
    7 * rows
}

/// Bytes on the device of a step; block tables of `positions` positions each included.
pub(crate) fn step_bytes(rows: usize, positions: usize) -> u64 {
    4 * (step_words(rows) as u64 + rows as u64 * positions.div_ceil(KvLayout::PAGE_TOKENS) as u64)
}

impl Step {
    pub(crate) fn new(device: &Arc<Device>, op: &'static str, rows: usize) -> Result<Self, OpsError> {
        // Room for a table of some pages each; longer ones grow it.
        let words = Words::new(device, op, check::product(op, rows, 16)?.max(1024))?;
        let (lists, naive, runs, scratch) = (Lists::default(), Vec::new(), Vec::new(), Vec::new());
        Ok(Self { info: StepInfo::default(), capacity: rows, words, lists, naive, runs, scratch })
    }

    pub(crate) fn fill(
        &mut self,
        op: &'static str,
        queue: &mut CudaQueue,
        step: &StepRows<'_>,
    ) -> Result<(), OpsError> {
        check::at_least(op, "row capacity of the step", self.capacity, step.ids.len())?;
        let info = StepInfo::of(op, step)?;
        let words = &mut self.scratch;
        words.clear();
        self.naive.clear();
        words.extend_from_slice(step.ids);
        let mut lists = Lists { positions: words.len(), ..Lists::default() };
        for segment in step.segments {
            words.extend((segment.first_position..).take(segment.rows));
        }
        lists.places = words.len();
        for segment in step.segments {
            words.extend((segment.first_position..).take(segment.rows).map(|position| {
                let page = segment.block_table[position as usize / KvLayout::PAGE_TOKENS];
                (page.index() * KvLayout::PAGE_TOKENS + position as usize % KvLayout::PAGE_TOKENS) as u32
            }));
        }
        // Each segment has a table; all tables are as long as the longest.
        lists.tables = words.len();
        let filled = || step.segments.iter().filter(|segment| segment.rows > 0);
        let pages = |segment: &StepSegment<'_>| {
            (segment.first_position as usize + segment.rows).div_ceil(KvLayout::PAGE_TOKENS)
        };
        lists.stride = filled().map(pages).max().unwrap_or(0);
        for (table, segment) in filled().enumerate() {
            words.extend(std::iter::repeat_n((table * lists.stride) as u32, segment.rows));
        }
        lists.table_of = words.len();
        let mut row = 0;
        self.runs.clear();
        for (table, segment) in filled().enumerate() {
            words.extend(std::iter::repeat_n(table as u32, segment.rows));
            let first_position = segment.first_position as usize;
            if segment.form == AttentionForm::Naive {
                let table = table * lists.stride;
                self.naive.push(Naive { first_row: row, rows: segment.rows, first_position, table });
            } else {
                for i in 0..segment.rows {
                    let follows =
                        |run: &Run| run.first_row + run.keys.len() == row + i && run.keys.len() < RUN_ROWS;
                    match self.runs.last_mut().filter(|run| follows(run)) {
                        Some(run) => run.keys.push(first_position + i + 1),
                        None => {
                            self.runs.push(Run { first_row: row + i, keys: vec![first_position + i + 1] })
                        }
                    }
                }
            }
            row += segment.rows;
        }
        lists.wanted = words.len();
        words.extend_from_slice(step.wanted);
        lists.absorbed = words.len();
        let mut row = 0;
        for segment in step.segments {
            if segment.form == AttentionForm::Absorbed {
                words.extend((row as u32..).take(segment.rows));
            }
            row += segment.rows;
        }
        lists.absorbed_rows = words.len() - lists.absorbed;
        lists.pages = words.len();
        for segment in filled() {
            let table = &segment.block_table[..pages(segment)];
            words.extend(table.iter().map(|page| page.index() as u32));
            // What lies behind a table is never looked up.
            words.extend(std::iter::repeat_n(0, lists.stride - table.len()));
        }
        self.words.put(op, queue, words)?;
        (self.info, self.lists) = (info, lists);
        Ok(())
    }

    pub(crate) fn info(&self) -> &StepInfo {
        &self.info
    }

    pub(crate) fn ids(&self) -> u64 {
        self.words.at(0)
    }

    pub(crate) fn positions(&self) -> u64 {
        self.words.at(self.lists.positions)
    }

    /// page x 64 + slot of each row.
    pub(crate) fn places(&self) -> u64 {
        self.words.at(self.lists.places)
    }

    /// Where each row's block table begins among the pages.
    pub(crate) fn tables(&self) -> u64 {
        self.words.at(self.lists.tables)
    }

    pub(crate) fn wanted(&self) -> u64 {
        self.words.at(self.lists.wanted)
    }

    /// The rows in absorbed form from one on, and how many there are from there.
    pub(crate) fn absorbed(&self, from: usize) -> (u64, usize) {
        (self.words.at(self.lists.absorbed + from), self.lists.absorbed_rows.saturating_sub(from))
    }

    /// The table of a row among tables of [`Self::table_pages`] pages.
    pub(crate) fn table_of(&self, row: usize) -> u64 {
        self.words.at(self.lists.table_of + row)
    }

    pub(crate) fn table_pages(&self) -> usize {
        self.lists.stride
    }

    /// The position of a row.
    pub(crate) fn position_of(&self, row: usize) -> u64 {
        self.words.at(self.lists.positions + row)
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub(crate) fn naive(&self) -> &[Naive] {
        &self.naive
    }

    /// The pages from one on.
    pub(crate) fn pages(&self, from: usize) -> u64 {
        self.words.at(self.lists.pages + from)
    }
}

/// A pass on the device.
#[derive(Debug)]
pub struct Pass {
    info: PassInfo,
    capacity: usize,
    words: Words,
    tasks: usize,
    groups: Vec<RowGroup>,
    scratch: Vec<u32>,
}

impl Pass {
    pub(crate) fn new(device: &Arc<Device>, op: &'static str, limits: PassLimits) -> Result<Self, OpsError> {
        // Input and output of each pair, three words for each task: at worst a task a pair.
        let words = Words::new(device, op, check::product(op, limits.pairs, 5)?)?;
        Ok(Self {
            info: PassInfo::default(),
            capacity: limits.pairs,
            words,
            tasks: 0,
            groups: Vec::new(),
            scratch: Vec::new(),
        })
    }

    pub(crate) fn fill(
        &mut self,
        op: &'static str,
        queue: &mut CudaQueue,
        pass: &PassRows<'_>,
    ) -> Result<(), OpsError> {
        check::at_least(op, "pair capacity of the pass", self.capacity, pass.input.len())?;
        let info = check_pass(op, pass)?;
        let words = &mut self.scratch;
        words.clear();
        words.extend_from_slice(pass.input);
        words.extend_from_slice(pass.output);
        let mut first = 0;
        for group in pass.groups {
            for at in (0..group.rows).step_by(TASK_ROWS) {
                let rows = TASK_ROWS.min(group.rows - at);
                words.extend([group.expert as u32, (first + at) as u32, rows as u32]);
            }
            first += group.rows;
        }
        self.tasks = (words.len() - 2 * info.pairs) / 3;
        self.groups.clear();
        self.groups.extend_from_slice(pass.groups);
        self.words.put(op, queue, words)?;
        self.info = info;
        Ok(())
    }

    pub(crate) fn info(&self) -> &PassInfo {
        &self.info
    }

    pub(crate) fn input(&self) -> u64 {
        self.words.at(0)
    }

    pub(crate) fn output(&self) -> u64 {
        self.words.at(self.info.pairs)
    }

    /// The pairs by expert.
    pub(crate) fn groups(&self) -> &[RowGroup] {
        &self.groups
    }

    /// (expert, first pair, pairs) of each task, and how many there are.
    pub(crate) fn tasks(&self) -> (u64, usize) {
        (self.words.at(2 * self.info.pairs), self.tasks)
    }
}

/// No expert of a row has a NaN logit.
const NO_NAN: u32 = u32::MAX;

/// Chosen experts and weights, on the device and on their way to the host.
#[derive(Debug)]
pub struct Routing {
    capacity: (usize, usize),
    pub(crate) rows: usize,
    /// F32 `[rows, top_k]`.
    pub(crate) weights: Memory,
    /// NaN marks `[rows]`, then ids as u16 `[rows, top_k]`.
    choices: Memory,
    host: Pinned,
    copied: Option<Event>,
}

impl Routing {
    pub(crate) fn new(
        device: &Arc<Device>,
        op: &'static str,
        rows: usize,
        top_k: usize,
    ) -> Result<Self, OpsError> {
        let pairs = check::product(op, rows, top_k)?;
        let bytes = check::product(op, rows, 4)? + check::product(op, pairs, 2)?;
        Ok(Self {
            capacity: (rows, top_k),
            rows: 0,
            weights: Memory::new(device, op, check::product(op, pairs, 4)?)?,
            choices: Memory::new(device, op, bytes)?,
            host: Pinned::new(device, op, bytes)?,
            copied: None,
        })
    }

    pub(crate) fn top_k(&self) -> usize {
        self.capacity.1
    }

    /// Checks that a choice fits.
    pub(crate) fn check(&self, op: &'static str, rows: usize, top_k: usize) -> Result<(), OpsError> {
        check::routing(op, self.capacity, rows, top_k)
    }

    /// Where the NaN marks and the ids of so many rows go.
    pub(crate) fn places(&self, rows: usize) -> (u64, u64) {
        (self.choices.address(), self.choices.at(4 * rows))
    }

    /// Starts the copy of a choice of so many rows to the host.
    pub(crate) fn chosen(
        &mut self,
        op: &'static str,
        queue: &mut CudaQueue,
        rows: usize,
    ) -> Result<(), OpsError> {
        // A copy of the gate before may still be under way.
        if let Some(event) = self.copied.take() {
            event.wait(op)?;
        }
        let bytes = rows * (4 + 2 * self.capacity.1);
        queue.stream.download(op, self.choices.address(), self.host.address(), bytes)?;
        self.copied = Some(queue.stream.record(op)?);
        self.rows = rows;
        Ok(())
    }

    /// Takes choices of the host; waits.
    pub(crate) fn write(
        &mut self,
        op: &'static str,
        queue: &mut CudaQueue,
        ids: &[u16],
        weights: &[f32],
    ) -> Result<(), OpsError> {
        let top_k = self.capacity.1;
        let rows = ids.len() / top_k.max(1);
        check::equal(op, "choices of whole rows", ids.len(), rows * top_k)?;
        check::equal(op, "weights", weights.len(), ids.len())?;
        self.check(op, rows, top_k)?;
        let marks = std::iter::repeat_n(NO_NAN, rows).flat_map(u32::to_le_bytes);
        let bytes: Vec<u8> = marks.chain(ids.iter().flat_map(|id| id.to_le_bytes())).collect();
        queue.stream.upload(op, &bytes, self.choices.address())?;
        let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        queue.stream.upload(op, &bytes, self.weights.address())?;
        self.chosen(op, queue, rows)?;
        Ok(queue.stream.synchronize(op)?)
    }

    /// The ids, once they are there.
    pub(crate) fn ids(&self, op: &'static str) -> Result<&[u16], OpsError> {
        if let Some(event) = &self.copied {
            event.wait(op)?;
        }
        let rows = self.rows;
        let (marks, ids) = self.host.as_slice().split_at(4 * rows);
        for (row, mark) in marks.as_chunks::<4>().0.iter().enumerate() {
            let expert = u32::from_le_bytes(*mark);
            if expert != NO_NAN {
                return Err(OpsError::NanGate { row, expert: expert as usize });
            }
        }
        // SAFETY: little-endian u16 (lib.rs refuses other machines) at a multiple of 4 of page-aligned memory that
        // the device has done with; any bits are a u16.
        Ok(unsafe { std::slice::from_raw_parts(ids.as_ptr().cast(), rows * self.capacity.1) })
    }
}
