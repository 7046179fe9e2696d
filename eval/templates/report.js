{# Compare two pictures, filter by prompt, sort a table. Every part starts from what it finds on the page. #}
(function(){'use strict';
function all(selector,root){return Array.prototype.slice.call((root||document).querySelectorAll(selector));}

all('.gallery').forEach(function(part){
var box=part.querySelector('.filter');if(!box)return;
var field=box.querySelector('input'),said=box.querySelector('output'),cards=all('.pair',part);
box.hidden=false;
field.addEventListener('input',function(){
var words=field.value.toLowerCase().split(/\s+/).filter(Boolean),shown=0;
cards.forEach(function(card){
var prompt=card.querySelector('p').textContent.toLowerCase();
card.hidden=!words.every(function(word){return prompt.indexOf(word)>=0;});
if(!card.hidden)shown+=1;});
all('details',part).forEach(function(fold){fold.open=words.length>0;});
said.textContent=words.length?shown+' of '+cards.length+' shown':'';});});

all('table.sortable').forEach(function(table){
var heads=all('thead th',table);
function value(row,column){
var raw=row.cells[column].getAttribute('data-value');
return column===0?row.cells[0].textContent:raw===null?null:Number(raw);}
heads.forEach(function(head,column){
head.querySelector('button').addEventListener('click',function(){
var way=head.getAttribute('aria-sort')==='ascending'?-1:1;
heads.forEach(function(other){other.removeAttribute('aria-sort');});
head.setAttribute('aria-sort',way>0?'ascending':'descending');
all('tbody tr',table).sort(function(a,b){
var x=value(a,column),y=value(b,column);
if(x===null||y===null)return (x===null)-(y===null);
return way*(x<y?-1:x>y?1:0);}).forEach(function(row){table.tBodies[0].appendChild(row);});});});});

var dialog=document.getElementById('viewer');if(!dialog||!dialog.showModal)return;
var stage=dialog.querySelector('.stage'),over=dialog.querySelector('.over'),under=dialog.querySelector('.under'),
line=dialog.querySelector('i'),bar=dialog.querySelector('input'),sides=all('select',dialog),
caption=dialog.querySelector('p'),shots=[],list=[],at=0;
function draw(){
var left=shots[sides[0].value],right=shots[sides[1].value];
over.src=left.src;over.alt=left.alt;under.src=right.src;under.alt=right.alt;
over.style.clipPath='inset(0 '+(100-bar.value)+'% 0 0)';line.style.left=bar.value+'%';
bar.setAttribute('aria-valuetext',bar.value+'% '+left.getAttribute('data-who'));}
function show(place){
at=(place+list.length)%list.length;shots=all('img',list[at]);
caption.textContent=list[at].parentNode.querySelector('p').textContent;
sides.forEach(function(side,index){
var kept=side.value;side.textContent='';
shots.forEach(function(shot,number){
var option=document.createElement('option');
option.value=number;option.textContent=shot.getAttribute('data-who');side.appendChild(option);});
side.value=kept&&kept<shots.length?kept:index;});
draw();}
function flip(){bar.value=bar.value>50?0:100;draw();}
function drag(event){
if(event.type==='pointermove'&&!event.buttons)return;
var box=stage.getBoundingClientRect();
bar.value=Math.round(100*(event.clientX-box.left)/box.width);draw();}
under.addEventListener('load',function(){stage.style.aspectRatio=under.naturalWidth+'/'+under.naturalHeight;});
all('.pair button').forEach(function(button){button.addEventListener('click',function(){
list=all('.pair:not([hidden]) button',button.closest('.gallery')||button.closest('ul'));
sides.forEach(function(side){side.textContent='';});
bar.value=50;show(list.indexOf(button));dialog.showModal();bar.focus();});});
bar.addEventListener('input',draw);
sides.forEach(function(side){side.addEventListener('change',draw);});
stage.addEventListener('pointerdown',drag);stage.addEventListener('pointermove',drag);
var acts={previous:function(){show(at-1);},flip:flip,next:function(){show(at+1);},close:function(){dialog.close();}};
all('button',dialog).forEach(function(button){button.addEventListener('click',acts[button.name]);});
dialog.addEventListener('keydown',function(event){
var key=event.key.toLowerCase(),tag=event.target.tagName;
if(event.ctrlKey||event.metaKey||event.altKey||tag==='SELECT'||(key===' '&&tag==='BUTTON'))return;
var act={' ':flip,f:flip,n:acts.next,p:acts.previous}[key];
if(act){act();event.preventDefault();}});
dialog.addEventListener('click',function(event){if(event.target===dialog)dialog.close();});
})();
